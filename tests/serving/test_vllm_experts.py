"""Mixtures of experts in vLLM engines generate what transformers generates, also after their weights have changed."""

import moe
import pytest
import support.vllm_required  # noqa: F401
import torch
from safetensors.torch import load_file
from support.engines import engine, greedy
from support.models.experts import save_moe
from support.oracles.greedy import assert_same_generation, greedy_transformers
from support.scripts import on_engine_ranks
from support.workers.experts import PROMPTS, TOKENS, sent, synced

import polyshard as ps
from polyshard.adapters.vllm.clients.protocol import SampleRequest
from polyshard.launch.ranks import run_ranks

pytestmark = pytest.mark.vllm

BOUND = 2e-5  # of a float32 log-probability
FAMILIES = {"qwen3_moe": "vllm", "gpt_oss": "vllm", "mixtral": "torch"}


@pytest.fixture(autouse=True)
def registered():
    for adapter in ("vllm", "torch"):
        ps.register_model(f"Experts{adapter}", moe.build_model, adapter=adapter)


@pytest.mark.parametrize(("kind", "adapter"), FAMILIES.items())
def test_generation_equals_transformers_before_and_after_a_sync(tmp_path, kind, adapter):
    old = save_moe(tmp_path / "old", kind, head_dim=32)
    context = ps.initialize("torch")
    model = moe.build_model(ps.read_config(old), context)
    ps.load_checkpoint(model, old, context)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or name.endswith(("gate.weight", "router.weight", "router.bias")):
                parameter.add_(0.05 * torch.randn_like(parameter))
    new = ps.save_checkpoint(model, tmp_path / "new", context, config=ps.read_config(old))
    with engine(old, f"Experts{adapter}") as llm:
        before = greedy(llm, PROMPTS, TOKENS)
        assert_same_generation(before, greedy_transformers(old, PROMPTS, TOKENS), BOUND)
        if kind == "qwen3_moe":
            # vLLM's own mixtures of experts serve garbage after this reload on CPU.
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(old)})
            llm.reset_prefix_cache()
            assert greedy(llm, PROMPTS, TOKENS) == before
        else:
            other = ps.ModelConfig(**{**ps.read_config(old).to_dict(), "num_experts_per_tok": 1})
            with pytest.raises(ps.ConfigurationError, match="experts_per_token .* is 1 in the trainer and 2 in engine"):
                ps.WeightSync(moe.build_model(other, context), context, llm)
            ps.WeightSync(model, context, llm)()
            after = greedy(llm, PROMPTS, TOKENS)
            assert_same_generation(after, greedy_transformers(new, PROMPTS, TOKENS), BOUND)
            assert after != before


def test_sync_between_unequal_expert_and_tensor_sizes(tmp_path):
    directory = save_moe(tmp_path / "model", "qwen3_moe", head_dim=32)
    trainers = {
        "expert 2": ({"expert": 2}, {}),
        "tensor 2": ({"tensor": 2}, {}),
        "pipeline 2": ({"pipeline": 2}, {}),
        "fsdp": ({}, {"data_parallel": "fsdp"}),
    }
    found = on_engine_ranks(synced, 2, directory, tmp_path, trainers)[0]
    assert_same_generation(found["before"], greedy_transformers(directory, PROMPTS, TOKENS), BOUND)
    for name in trainers:
        assert_same_generation(found[name], greedy_transformers(tmp_path / name, PROMPTS, TOKENS), BOUND)
        assert found[name] != found["before"]


def test_a_sync_repairs_an_engine_whose_requests_have_failed(tmp_path, caplog):
    """The router raises for weights with NaN, and vLLM keeps the requests of the failed step for ever."""
    from vllm import SamplingParams

    directory = save_moe(tmp_path / "model", "qwen3_moe", head_dim=32)
    context = ps.initialize("torch")
    model = moe.build_model(ps.read_config(directory), context)
    ps.load_checkpoint(model, directory, context)
    gate = next(parameter for name, parameter in model.named_parameters() if name.endswith("gate.weight"))
    correct = gate.detach().clone()
    prompt = {"prompt_token_ids": [1, 2, 3]}
    options = {"max_num_seqs": 2, "dtype": "float32", "weight_transfer_config": {"backend": "polyshard"}}
    with ps.RolloutEngine(
        directory, "Expertsvllm", model, context, kv_cache_memory_bytes=1 << 26, **options
    ) as rollouts:
        llm, sync = rollouts.llm, ps.WeightSync(model, context, rollouts.llm, share=False)
        core = llm.llm_engine

        def break_and(act, error):
            with torch.no_grad():
                gate.fill_(float("nan"))
            sync()
            with pytest.raises(error, match="The router's logits are not finite"):
                act()
            with torch.no_grad():
                gate.copy_(correct)

        expected = greedy(llm, PROMPTS, TOKENS)
        break_and(lambda: greedy(llm, PROMPTS, TOKENS), ps.RoutingError)
        assert core.has_unfinished_requests()
        sync()
        assert f"engine 0: {len(PROMPTS)} requests were aborted: a forward pass" in caplog.text
        assert greedy(llm, PROMPTS, TOKENS) == expected

        break_and(lambda: greedy(llm, PROMPTS, TOKENS), ps.RoutingError)
        core.add_request("living", prompt, SamplingParams(max_tokens=2, detokenize=False))
        with pytest.raises(ps.WeightSyncError, match="has 1 unfinished requests"):
            sync()
        core.abort_request(["living"])
        sync()

        client = ps.LlmClient(llm, "first")
        request = SampleRequest("a", (1, 2, 3), {"max_tokens": 2})
        break_and(lambda: client.generate(request), ConnectionError)
        assert not core.has_unfinished_requests()
        sync()
        for _ in range(2):  # with two lost requests in its two places, the engine would step for ever
            break_and(lambda: rollouts.generate([[1, 2, 3]], max_tokens=2), ps.RoutingError)
            assert not core.has_unfinished_requests()
        sync()
        assert greedy(llm, PROMPTS, TOKENS) == expected


def test_expert_parallel_in_the_server_is_refused(tmp_path):
    directory = save_moe(tmp_path / "model", "mixtral", head_dim=32)
    with (
        pytest.raises(ps.RegistrationError, match="enable_expert_parallel, which is unsupported: vLLM's CPU experts"),
        engine(directory, "Expertsvllm", enable_expert_parallel=True),
    ):
        pass


def test_vllms_own_transfer_gets_every_expert(tmp_path):
    directory = save_moe(tmp_path / "model", "qwen3_moe")
    stored = load_file(directory / "model.safetensors")
    for tensors in run_ranks(sent, 2, directory):
        assert set(tensors) == set(stored)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in stored.items())
