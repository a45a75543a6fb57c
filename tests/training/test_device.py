"""A model stands and computes where its context says; torch's `meta` device, which refuses to meet another, shows it.

What it cannot show is what kernels compute there: tests marked `gpu` do.
"""

import dataclasses

import decoder
import nanogpt
import pytest
import torch
from support.attention_cases import FEATURES, LENGTHS, case
from support.models import latent
from support.models.tiny import tiny_config
from support.rotary_scalings import SCALINGS
from torch import nn

import polyshard as ps
from polyshard.adapters.shared.devices import check_devices, default_backend, pick_backend, pick_device
from polyshard.attention.kernel_call import call_of
from polyshard.attention.kernels.cpu.kernels import Chunked
from polyshard.attention.kernels.cuda.torch_varlen import TorchVarlen
from polyshard.attention.kernels.softmax import sinks_gradient, with_sinks
from polyshard.attention.packing import of_lengths
from polyshard.core.attention import AttentionSpec
from polyshard.core.context import GroupContext

META = torch.device("meta")
TRAINERS = [
    name
    for name in ps.adapter_names()
    if ps.load_adapter(name).capabilities["training"].available and ps.load_adapter(name).requirement.version()
]


class AnyMixture(nn.Module):
    """In place of attention, whose operator wants lengths that a device without data has not."""

    def forward(self, q, k, v, sequences):
        return (q * k.mean(-2, keepdim=True))[..., : v.shape[-1]] + v.mean(-2, keepdim=True)


@pytest.fixture
def context(request):
    made = ps.initialize(request.param, device="meta")
    yield dataclasses.replace(made, attention=lambda spec, sinks=None: AnyMixture())
    ps.shutdown(made)


@pytest.mark.parametrize("context", TRAINERS, indirect=True)
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_forward_and_backward_meet_no_other_device(context, kind):
    model = decoder.build_model(tiny_config(kind, tie_word_embeddings=kind == "llama", attention_bias=True), context)
    ids = torch.zeros(2, 8, dtype=torch.int64, device=META)
    for positions in (None, torch.zeros_like(ids)):
        model.compute_logits(model(ids, positions)).float().logsumexp(-1).sum().backward()
    assert {parameter.grad.device for parameter in model.parameters()} == {META}


@pytest.mark.parametrize("asked", [None, "cuda"])
def test_a_ranks_gpu_is_that_of_its_number(monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(asked) == torch.device("cuda", 1)
    assert pick_device("cuda:0") == torch.device("cuda", 0)
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ps.ConfigurationError, match="needs GPU 2, but this machine has 2"):
        pick_device(asked)
    assert pick_device(asked, backend="gloo") == torch.device("cuda", 0), "with gloo, ranks share GPUs in turn"
    with pytest.raises(ps.ConfigurationError, match="needs GPU 3"):
        pick_device("cuda:3", backend="gloo")


def test_the_backend_is_the_argument_then_the_environment_then_the_devices_own(monkeypatch):
    assert (default_backend(torch.device("cuda")), default_backend(torch.device("cpu"))) == ("nccl", "gloo")
    monkeypatch.setenv("POLYSHARD_BACKEND", "gloo")
    assert default_backend(torch.device("cuda")) == pick_backend() == "gloo"
    assert pick_backend("nccl") == "nccl"
    with pytest.raises(ps.ConfigurationError, match="backend nccl needs GPUs: got device cpu"):
        pick_device("cpu", backend="nccl")
    monkeypatch.setenv("POLYSHARD_BACKEND", "mpi")
    with pytest.raises(
        ps.ConfigurationError, match="POLYSHARD_BACKEND is unsupported: got 'mpi', expected one of nccl"
    ):
        ps.initialize("torch")


@pytest.mark.parametrize("adapter", [name for name in TRAINERS if name != "deepspeed"])  # it moves them by itself
def test_a_parameter_on_another_device_is_named(adapter):
    context = ps.initialize(adapter, device="meta")

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = ps.column_parallel(4, 4, context)
            self.norm = nn.LayerNorm(4)

    with pytest.raises(ps.ConfigurationError, match=r"parameter norm.weight is on cpu, .* computes on meta"):
        ps.load_adapter(adapter).engine(Mixed(), ps.AdamW(), context)
    ps.shutdown(context)


def test_a_device_without_a_number_stands_for_any_of_its_type():
    context = GroupContext(layout=ps.ParallelLayout(), device=torch.device("cpu", 0), linear=None)
    check_devices(nn.Linear(2, 2, device="cpu"), context)


@pytest.mark.skipif("deepspeed" not in TRAINERS, reason="DeepSpeed is not installed")
def test_deepspeed_moves_no_model_off_its_ranks_device():
    context = ps.initialize("deepspeed", device="meta")
    layer = ps.column_parallel(4, 4, context)
    with pytest.raises(ps.ConfigurationError, match=r"computes on cpu .* this rank on meta: .* DS_ACCELERATOR=meta"):
        ps.load_adapter("deepspeed").engine(layer, ps.AdamW(), context)
    ps.shutdown(context)


@pytest.mark.parametrize("context", ["torch"], indirect=True)
def test_plain_modules_of_a_factory_stand_there_too(context):
    model = nanogpt.build_model(
        nanogpt.GPTConfig(block_size=32, vocab_size=64, n_layer=1, n_head=2, n_embd=32), context
    )
    ids = torch.zeros(2, 8, dtype=torch.int64, device=META)
    model(ids, labels=ids).backward()
    assert {parameter.grad.device for parameter in model.parameters()} == {META}


@pytest.mark.parametrize("context", ["torch"], indirect=True)
def test_latent_attention_meets_no_other_device(context):
    model = latent.build(ps.ModelConfig(**latent.CONFIG), context)
    ids = torch.zeros(1, 8, dtype=torch.int64, device=META)
    model.compute_logits(model(ids, torch.zeros_like(ids))).sum().backward()
    assert {parameter.grad.device for parameter in model.parameters()} == {META}


@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_frequencies_are_made_under_any_default_device(name):
    """As a server on a GPU builds its models."""
    with META:
        rotary = ps.RotaryEmbedding(32, scaling=SCALINGS[name], max_position=256)
    cos, _ = rotary(torch.arange(5), torch.float32)
    want, _ = ps.RotaryEmbedding(32, scaling=SCALINGS[name], max_position=256)(torch.arange(5), torch.float32)
    assert torch.equal(cos, want)


@pytest.mark.vllm
def test_what_a_captured_graph_reads_is_made_within_it():
    from polyshard.adapters.vllm.attention.layer import RotaryTable

    table, first, second = RotaryTable(), object(), object()
    seen = []
    for _ in range(2):  # two forwards of two layers
        cos = torch.empty(3, 1, 8, device=META)
        made, rows = table.get(first, cos, cos)
        assert table.get(second, cos, cos) == (made, rows)
        seen += [made, rows]
    assert len({id(tensor) for tensor in seen}) == 4


def on_meta(feature):
    """A feature's q, k, v, gradient of the output and sinks, and its call."""
    features = dict(FEATURES[feature])
    shape = {name: features.pop(name, None) for name in ("key_lengths", "value_dim", "sinks")}
    *tensors, sinks = case(LENGTHS, 4, 2, 32, torch.bfloat16, **shape)
    q, k, v, grad_out = (t.to(META) for t in tensors)
    spec = AttentionSpec(
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        value_dim=v.shape[-1],
        scale=features.get("scale", 0.2),
        causal=features.get("causal", True),
        sliding_window=features.get("window"),
        softcap=features.get("softcap"),
        alibi_slopes=features.get("slopes"),
    )
    keys = of_lengths(shape["key_lengths"], META) if shape["key_lengths"] else None
    call = call_of(q, of_lengths(LENGTHS, META), spec, keys)
    return q, k, v, grad_out, None if sinks is None else sinks.to(META), call


@pytest.mark.parametrize("feature", FEATURES)
def test_tiles_of_attention_are_made_on_the_device_of_their_tensors(feature):
    q, k, v, grad_out, sinks, call = on_meta(feature)
    out, logsumexp, saved = Chunked().forward(q, k, v, call)
    if sinks is not None:
        out, logsumexp = with_sinks(out, logsumexp, sinks)
        assert sinks_gradient(grad_out, out, logsumexp, sinks).device == META
    grads = Chunked().backward(grad_out, q, k, v, out, logsumexp, saved, call)
    assert {t.device for t in (out, logsumexp, *grads)} == {META}
    assert out.shape == (sum(LENGTHS), 4, v.shape[-1])


@pytest.mark.parametrize("feature", ["causal", "not causal", "window", "window, not causal", "more keys than queries"])
def test_torchs_flash_operators_take_what_the_varlen_kernel_hands_over(feature):
    """Their meta kernels bind the arguments and tell the shapes; the numbers are a GPU's affair."""
    q, k, v, grad_out, _, call = on_meta(feature)
    out, logsumexp, saved = TorchVarlen().forward(q, k, v, call)
    assert out.shape == q.shape
    assert (logsumexp.shape, logsumexp.dtype) == (q.shape[:2], torch.float32)
    grads = TorchVarlen().backward(grad_out, q, k, v, out, logsumexp, saved, call)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
