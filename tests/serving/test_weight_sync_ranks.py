"""Live weights over several ranks: trainers of every library and size, beside an engine and apart from it."""

import pytest
from support.engines import engine, greedy
from support.models.tiny import save_tiny
from support.scripts import on_engine_ranks
from support.workers.colocated_sync import train_beside
from support.workers.remote_sync import PROMPTS, train_apart

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("sync") / "old", "qwen3", head_dim=32, tie_word_embeddings=True)


TRAINERS = [
    ("torch", 2, {}),
    ("torch", 1, {"data_parallel": "fsdp"}),
    ("torch", 1, {"pipeline": 2}),
    ("megatron", 2, {"zero_stage": 1}),
    ("deepspeed", 1, {"zero_stage": 3}),
    ("fairscale", 1, {"zero_stage": 2}),
]


@pytest.mark.parametrize("served", ["vllm", "torch"])
def test_trainers_beside_an_engine_of_two_ranks(directory, tmp_path, served):
    """Each sync gives exactly what the same weights give when they are loaded from disk."""
    for results in on_engine_ranks(train_beside, 2, directory, tmp_path, served, TRAINERS):
        assert len(results) == len(TRAINERS)
        for name, result in results.items():
            assert result["new"], name
            assert result["as loaded from disk"], name
            assert result["as a source of vLLM's"], name
            assert (result["shared"] > 0) == (" 2 " in name), name


@pytest.mark.parametrize(
    ("ranks", "adapter", "tensor", "options", "engine_tensor", "dtype"),
    [
        (2, "torch", 1, {"data_parallel": "fsdp"}, 2, "bfloat16"),
        (2, "megatron", 2, {"zero_stage": 1}, 1, "float32"),
    ],
)
def test_a_trainer_apart_from_the_engine(directory, tmp_path, ranks, adapter, tensor, options, engine_tensor, dtype):
    arguments = (directory, tmp_path, adapter, tensor, options, engine_tensor, dtype)
    result = on_engine_ranks(train_apart, ranks, *arguments)[0]
    assert result["first"] == result["second"] != result["before"]
    assert result["over the network"] == result["first"]
    assert (result["first version"], result["second version"]) == ("first", "second")
    if engine_tensor == 1:
        import decoder

        import polyshard as ps

        ps.register_model("Alone", decoder.build_model)
        with engine(tmp_path / "trained", "Alone", dtype=dtype) as llm:
            assert greedy(llm, PROMPTS, 8) == result["first"]
