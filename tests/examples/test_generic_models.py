"""The seed's list of tests, for real: a user's model on a user's adapter of Megatron's layers."""

import importlib
import os
from pathlib import Path

import megatron_adapter
import pytest
import torch
from support import forked
from support.servers import ENGINE_WITHOUT_WORKER_PROCESS

import polyshard as ps
from polyshard.registry import resolve
from polyshard.testing import run_ranks

EXAMPLE = Path(megatron_adapter.__file__)


def small_config():
    return ps.ModelConfig(
        vocab_size=61, hidden_size=64, head_dim=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )


def test_flash_attention_forward():
    attention = ps.TrainableFlashAttention(hidden_size=64, num_heads=4).eval()
    x = torch.randn(2, 16, 64)
    q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in attention.qkv(x).split(64, dim=-1))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attention(x), attention.o_proj(want.transpose(1, 2).flatten(-2)))


def test_flash_attention_backward():
    attention = ps.TrainableFlashAttention(hidden_size=64, num_heads=4)
    x = torch.randn(2, 16, 64, requires_grad=True)
    attention(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attention.parameters())


def mixed_model(tensor):
    context = ps.initialize("torch", tensor=tensor, timeout=60)
    model = megatron_adapter.build_model(small_config(), context)
    ps.initialize_weights(model, context, seed=0)
    ids = torch.arange(24).view(2, 12) % 61
    logits = model.compute_logits(model(ids))
    loss = ps.vocab_parallel_cross_entropy(logits, ids, context, vocab_size=61)
    loss.backward()
    kinds = {type(m).__module__.split(".")[0] for m in model.modules()}
    assert {"megatron", "polyshard"} <= kinds
    assert all(p.grad is not None for p in model.parameters())
    full = ps.gather_logits(logits, context, 61)
    ps.shutdown(context)
    return full, loss.item()


def test_model_forward_is_the_same_at_every_size():
    one, two = run_ranks(mixed_model, 1, 1)[0], run_ranks(mixed_model, 2, 2)[0]
    torch.testing.assert_close(two[0], one[0], rtol=1e-5, atol=1e-5)
    assert two[1] == pytest.approx(one[1], rel=1e-5)


def train(directory):
    return megatron_adapter.train(str(directory), steps=60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("generic") / "checkpoint"
    first, second = run_ranks(train, 2, directory)
    assert first == second
    return directory, first


def test_model_training(checkpoint):
    assert checkpoint[1] < 0.5  # from log(61) = 4.1


def test_wrapper_has_what_vllm_inspects():
    pytest.importorskip("vllm", reason="needs vLLM")
    from vllm.model_executor.models.interfaces_base import is_text_generation_model

    from polyshard.adapters.vllm.served.model import make_model_class
    from polyshard.core.serving import RegisteredModel

    entry = RegisteredModel(name="MegatronMixed", reference="megatron_adapter:build_model")
    assert is_text_generation_model(make_model_class(entry, megatron_adapter.build_model))


def test_callback_registration(monkeypatch):
    monkeypatch.delenv("POLYSHARD_MODELS", raising=False)
    ps.register_model("MegatronMixed", megatron_adapter.build_model)
    reference = ps.registered_models()["MegatronMixed"].reference
    assert resolve(reference) is importlib.import_module("megatron_adapter").build_model


@pytest.mark.vllm
def test_llm_integration(checkpoint):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", **ENGINE_WITHOUT_WORKER_PROCESS}
    done = forked.run(EXAMPLE, [str(checkpoint[0]), "--generate"], env, timeout=200)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "[13, 16, 19, 22, 25, 28]" in done.stdout


def two_adapters_side_by_side():
    first = ps.initialize("torch", tensor=2, timeout=60)
    second = ps.load_adapter("megatron").adopt(first)
    third = ps.load_adapter("deepspeed").adopt(first)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    for context in (first, second, third):
        layer = torch.nn.Module()
        layer.up = ps.column_parallel(8, 6, context)
        layer.down = ps.row_parallel(6, 8, context)
        ps.initialize_weights(layer, context, seed=1)
        outputs.append(layer.down(layer.up(x)))
    ps.shutdown(third)
    return outputs


def test_three_libraries_stand_side_by_side_in_one_process():
    for torch_output, megatron_output, deepspeed_output in run_ranks(two_adapters_side_by_side, 2):
        torch.testing.assert_close(megatron_output, torch_output)
        torch.testing.assert_close(deepspeed_output, torch_output)
