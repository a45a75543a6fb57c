"""An engine tells which experts its tokens took; transformers' routers in float32 are the oracle."""

import moe
import pytest
import support.vllm_required  # noqa: F401
import torch
from support.engines import engine
from support.models.experts import VOCAB, routers_of_transformers, save_moe

import polyshard as ps
from polyshard.adapters.vllm.engines.rollout import check_sampling, refuse_chunked_seeds
from polyshard.cli.verify_exact import random_prompts

pytestmark = pytest.mark.vllm


def test_routing_of_chunked_and_cached_prompts_is_that_of_transformers(tmp_path):
    from vllm import SamplingParams

    directory = save_moe(tmp_path / "model", "qwen3_moe", head_dim=32)
    ps.register_model("Routed", moe.build_model)
    options = {"worker_extension_cls": ps.ROUTING_WORKER, "max_num_batched_tokens": 64, "max_num_seqs": 8}
    options["block_size"] = 32
    at_once = [[*range(40, 75), last] for last in range(4)]  # each continues a block of the first, in one step
    prompts, parameters = random_prompts(VOCAB), SamplingParams(max_tokens=12, detokenize=False)
    with engine(directory, "Routed", enable_prefix_caching=True, **options) as llm:
        outputs = [
            output
            for batch in (at_once, prompts[:4], prompts[4:])  # prompts of the last call share prefixes with others
            for output in llm.generate([{"prompt_token_ids": p} for p in batch], parameters, use_tqdm=False)
        ]
        sequences = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
        routing = ps.served_routing(llm, sequences)
        with pytest.raises(ps.ConfigurationError, match="the engine has no routing of 3 tokens"):
            ps.served_routing(llm, [[1, 2, 3, 4]])
        for given, starts, message in (
            (
                [1, 2, 3],
                (),
                "sequences are invalid: 'int' object is not iterable, expected a list of token IDs for each",
            ),
            (["text"], (), "sequences are invalid: 'str' object cannot be interpreted as an integer"),
            (sequences[:2], [0], "starts are invalid: got 1 for 2 sequences"),
            (sequences[:1], [-1], r"starts\[0\] is invalid: got -1, expected a token of the sequence of"),
        ):
            with pytest.raises(ps.ConfigurationError, match=message):
                ps.served_routing(llm, given, starts)
        with pytest.raises(ps.ConfigurationError, match=r"stop=\['a'\] is unsupported: .* Use stop_token_ids="):
            check_sampling({"stop": ["a"], "stop_token_ids": [3]})
        refuse_chunked_seeds(llm, {"seed": 3}, [[1] * 20] * 3, 1)
        refuse_chunked_seeds(llm, {"seed": None}, [[1] * 20] * 4, 1)
        with pytest.raises(ps.ConfigurationError, match="got 84 tokens for 2 prompts and samples=2, expected at most"):
            refuse_chunked_seeds(llm, {"seed": 3}, [[1] * 20] * 2, 2)
    assert sum(output.num_cached_tokens for output in outputs) > 96
    for sequence, experts in zip(sequences, routing, strict=True):
        assert list(experts) == ["model.layers.0.mlp", "model.layers.1.mlp"]
        for layer, expected in zip(experts.values(), routers_of_transformers(directory, sequence), strict=True):
            assert torch.equal(layer.sort(-1).values, expected)


def test_generators_on_cpu_still_have_no_offset():
    """Why seeds are refused for chunked prompts: vLLM moves the offset of a request's generator."""
    with pytest.raises(RuntimeError, match="CPU Generator does not use offset"):
        torch.Generator().set_offset(0)


def test_an_engine_without_routing_says_how_to_start_it(tmp_path):
    directory = save_moe(tmp_path / "model", "qwen3_moe", head_dim=32, num_hidden_layers=1)
    ps.register_model("Routed", moe.build_model)
    with (
        engine(directory, "Routed") as llm,
        pytest.raises(ps.ConfigurationError, match="Start it with worker_extension_cls=ps.ROUTING_WORKER"),
    ):
        ps.served_routing(llm, [[1, 2]])
