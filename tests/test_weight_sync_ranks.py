"""Live weights over several ranks: trainers of every library and size, beside an engine and apart from it."""

import json

import pytest
from support.engines import engine, greedy
from support.models import save_tiny
from support.remote_sync import PROMPTS
from support.scripts import torchrun

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("sync") / "old", "qwen3", head_dim=32, tie_word_embeddings=True)


TRAINERS = [
    ("torch", 2, {}),
    ("torch", 1, {"data_parallel": "fsdp"}),
    ("megatron", 2, {"zero_stage": 1}),
    ("deepspeed", 1, {"zero_stage": 3}),
    ("fairscale", 1, {"zero_stage": 2}),
]


@pytest.mark.parametrize("served", ["vllm", "torch"])
def test_trainers_beside_an_engine_of_two_ranks(directory, tmp_path, served):
    """Each sync gives exactly what the same weights give when they are loaded from disk."""
    torchrun(2, "colocated_sync.py", directory, tmp_path, served, json.dumps(TRAINERS))
    for rank in range(2):
        results = json.loads((tmp_path / f"result-{rank}.json").read_text())
        assert len(results) == len(TRAINERS)
        for name, result in results.items():
            assert result["new"], name
            assert result["as loaded from disk"], name
            assert (result["shared"] > 0) == (" 2 " in name), name


@pytest.mark.parametrize(
    ("ranks", "adapter", "tensor", "options", "engine_tensor", "dtype"),
    [
        (2, "torch", 1, {"data_parallel": "fsdp"}, 2, "bfloat16"),
        (2, "megatron", 2, {"zero_stage": 1}, 1, "float32"),
    ],
)
def test_a_trainer_apart_from_the_engine(directory, tmp_path, ranks, adapter, tensor, options, engine_tensor, dtype):
    arguments = (directory, tmp_path, adapter, tensor, json.dumps(options), engine_tensor, dtype)
    torchrun(ranks, "remote_sync.py", *arguments)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["first"] == result["second"] != result["before"]
    assert (result["first version"], result["second version"]) == ("first", "second")
    if engine_tensor == 1:
        import decoder

        import polyshard as ps

        ps.register_model("Alone", decoder.build_model)
        with engine(tmp_path / "trained", "Alone", dtype=dtype) as llm:
            assert [[list(x) for x in pair] for pair in greedy(llm, PROMPTS, 8)] == result["first"]
