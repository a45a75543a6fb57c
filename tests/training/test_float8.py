"""Float8 on torch's layers: products and gradients are those of torchao's Float8Linear, at every parallel layout.

torchao itself emulates the products on the CPU. Nothing here has run on a GPU.
"""

from dataclasses import replace
from functools import partial
from typing import get_args

import pytest
import torch
import transformers
from support.models.tiny import save_tiny
from support.workers.float8 import STEPS, outcomes
from support.workers.precision import losses_of_transformers_model
from torch import nn
from torch._dynamo.utils import counters

import polyshard as ps
from polyshard.adapters.torch.float8 import apply_float8
from polyshard.core import requirement
from polyshard.core.precision import Float8Recipe
from polyshard.testing import run_ranks
from polyshard.training.compile import apply_compile

pytest.importorskip("torchao", reason="needs torchao, which make test-transformers installs")
RECIPES = get_args(Float8Recipe)
BF16 = torch.bfloat16
SHAPE = {"hidden_size": 64, "intermediate_size": 96}  # multiples of 16 on each of two tensor-parallel ranks
FLOAT8, MIXED = ps.Precision(float8="rowwise"), ps.Precision(compute=BF16, float8="rowwise")
BAND = 2e-2  # mean distance of the losses from those of float32, and of torchao's layers
CASES = {
    "data": (
        {},
        [
            *((FLOAT8, {}), (FLOAT8, {"recompute": "full"}), (FLOAT8, {"recompute": "selective"})),
            *(
                (FLOAT8, {"data_parallel": "fsdp"}),
                (MIXED, {"data_parallel": "fsdp"}),
                (ps.Precision(parameters=BF16, float8="tensorwise"), {}),
            ),
        ],
    ),
    "tensor": ({"tensor": 2}, [(FLOAT8, {}), (MIXED, {})]),
    "sequence": ({"tensor": 2, "sequence_parallel": True}, [(FLOAT8, {"recompute": "selective"}), (MIXED, {})]),
}


def by_torchao(model, recipe):
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    return convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: "lm_head" not in name)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("float8") / "model", "llama", **SHAPE)


@pytest.fixture(scope="module")
def layers():
    """Weights of two layers, an input, and a gradient of the output."""
    torch.manual_seed(0)
    return [torch.randn(64, 32), torch.randn(32, 64)], torch.randn(8, 32), torch.randn(8, 32)


@pytest.fixture(scope="module")
def ranks(directory, layers):
    return run_ranks(outcomes, 2, directory, CASES, "tensorwise", *layers, timeout=280)


def test_recipes_are_those_of_torchao():
    from torchao.float8 import Float8LinearRecipeName

    assert set(RECIPES) == {name.value for name in Float8LinearRecipeName}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients_are_those_of_torchao_bit_for_bit(recipe, autocast):
    context = ps.initialize("torch")
    ours = nn.Sequential(ps.column_parallel(32, 48, context, bias=True), nn.GELU(), ps.row_parallel(48, 16, context))
    nn.init.normal_(ours[0].bias)
    theirs = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16, bias=False))
    theirs.load_state_dict(ours.state_dict())
    theirs = by_torchao(theirs, recipe)
    x, gradient = torch.randn(3, 7, 32), torch.randn(3, 7, 16)  # 21 tokens, which are no multiple of 16
    before = ours(x)
    undo = apply_float8(ours, recipe, context)
    found = []
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        # Float8Linear casts its input for autocast on a GPU only.
        given = leaf.to(BF16) if autocast and model is theirs else leaf
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            y = model(given)
        y.backward(gradient.to(y.dtype))
        found.append([y.detach(), leaf.grad, *(parameter.grad for parameter in model.parameters())])
    assert found[0][0].dtype == (BF16 if autocast else torch.float32)
    for value, wanted in zip(*found, strict=True):
        assert torch.equal(value, wanted)
    undo()
    assert torch.equal(ours(x), before)


def test_each_rank_scales_its_own_shards(ranks, layers):
    """Two tensor-parallel ranks compute what two pairs of torchao's layers do, without and with sequence parallel."""
    weights, x, gradient = layers
    shards, leaf = [], x.clone().requires_grad_()
    for up, down in zip(weights[0].chunk(2, 0), weights[1].chunk(2, 1)):
        shard = nn.Sequential(nn.Linear(32, 32, bias=False), nn.GELU(), nn.Linear(32, 32, bias=False))
        shard.load_state_dict({"0.weight": up, "2.weight": down})
        shards.append(by_torchao(shard, "tensorwise"))
    y = shards[0](leaf) + shards[1](leaf)
    y.backward(gradient)
    for rank, outcome in enumerate(ranks):
        half = slice(rank * 4, rank * 4 + 4)
        for mine, (output, of_input, of_up, of_down) in zip((slice(None), half), outcome["layers"], strict=True):
            torch.testing.assert_close(output, y.detach()[mine])
            torch.testing.assert_close(of_input, leaf.grad[mine])
            assert torch.equal(of_up, shards[rank][0].weight.grad)
            assert torch.equal(of_down, shards[rank][2].weight.grad)


def losses_of_transformers(directory, recipe=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = model if recipe is None else by_torchao(model, recipe)
    return torch.tensor(losses_of_transformers_model(model, STEPS))


def test_losses_follow_float32_at_every_parallel_layout(ranks, directory):
    found = ranks[0]["curves"]
    assert found == ranks[1]["curves"]  # the same loss on every rank
    float8, float32 = losses_of_transformers(directory, "rowwise"), losses_of_transformers(directory)
    for name, (_, cases) in CASES.items():
        for case, losses in zip(cases, map(torch.tensor, found[name]), strict=True):
            assert (losses - float8).abs().mean() < BAND, (name, case)
            assert (losses - float32).abs().mean() < BAND, (name, case)


def test_the_first_loss_is_that_of_transformers_with_torchaos_layers(ranks, directory):
    """Scales by row are powers of two: neither fused projections nor tensor-parallel shards change the outcome."""
    wanted, float32 = losses_of_transformers(directory, "rowwise")[0], losses_of_transformers(directory)[0]
    assert (wanted - float32).abs() > 5e-4
    for name, (_, cases) in CASES.items():
        for case, losses in zip(cases, ranks[0]["curves"][name], strict=True):
            if case[0] == FLOAT8:
                assert losses[0] == pytest.approx(wanted.item(), abs=1e-5), (name, case)


def test_recomputation_and_sharding_over_the_data_axis_change_no_loss(ranks):
    plain, full, selective, fsdp = ranks[0]["curves"]["data"][:4]
    assert full == selective == plain
    assert fsdp == pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_compiled_modules_have_one_graph_for_all_numbers_of_tokens(monkeypatch, recipe):
    """`aot_eager` runs the captured graphs, forward and backward, without generating code, which takes seconds."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    context = ps.initialize("torch")
    model = nn.Sequential(ps.column_parallel(32, 48, context), nn.GELU(), ps.row_parallel(48, 16, context))
    apply_float8(model, recipe, context)
    inputs = [torch.randn(tokens, 32, requires_grad=True) for tokens in (21, 32, 40)]

    def results():
        for x in inputs:
            y = model(x)
            yield y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])

    eager = list(results())
    torch._dynamo.reset()
    counters.clear()
    undo = apply_compile(model, lambda module: module is model)
    with torch._dynamo.config.patch(disable=False):
        for tensors, wanted in zip(results(), eager, strict=True):
            torch.testing.assert_close(tensors, wanted)
    undo()
    assert (counters["stats"]["unique_graphs"], counters["graph_break"].total()) == (1, 0)


def test_other_engines_and_exact_mode_refuse_float8(ranks):
    errors = ranks[0]["refusals"]
    assert "Transformer Engine" in errors["megatron"]
    assert "automatic tensor parallelism" in errors["deepspeed"]
    assert "FairScale has no float8" in errors["fairscale"]
    assert "float8 is unsupported in exact mode: got Precision(float8='tensorwise')" in errors["torch"]
    with pytest.raises(ps.ConfigurationError, match="invalid for exact mode: got float8='rowwise', expected None"):
        ps.initialize("torch", exact=True, precision=FLOAT8)


def test_layers_of_other_sizes_are_left_out_and_named(caplog):
    context = ps.initialize("torch")
    model = nn.ModuleDict({"up": ps.column_parallel(32, 24, context), "down": ps.row_parallel(32, 16, context)})
    x = torch.randn(4, 32)
    before = model["up"](x), model["down"](x)
    apply_float8(model, "tensorwise", context)
    assert "left out of float8: sizes of weights on a rank must be multiples of 16, got up [24, 32]" in caplog.text
    assert torch.equal(model["up"](x), before[0])
    assert not torch.equal(model["down"](x), before[1])
    with pytest.raises(
        ps.ConfigurationError, match=r"no layer in ColumnParallelLinear.*ColumnParallelLinear \[24, 32\]"
    ):
        apply_float8(ps.column_parallel(32, 24, context), "tensorwise", context)
    with pytest.raises(ps.ConfigurationError, match=r"no layer in Linear.*Build them with ps.column_parallel"):
        apply_float8(nn.Linear(16, 16), "tensorwise", context)


def test_precisions_without_a_float8_product_are_refused():
    with pytest.raises(ps.ConfigurationError, match="got 'delayed', expected None or one of 'tensorwise', 'rowwise'"):
        ps.Precision(float8="delayed")
    with pytest.raises(ps.ConfigurationError, match="unsupported with compute=torch.float16: expected torch.bfloat16"):
        ps.Precision(compute=torch.float16, float8="rowwise")


def test_a_gpu_without_float8_and_a_missing_torchao_are_refused(monkeypatch):
    context = ps.initialize("torch")
    monkeypatch.setattr(requirement, "find_spec", lambda name: None)
    with pytest.raises(ps.MissingDependencyError, match=r"torchao is not installed.*'polyshard\[float8\]'"):
        apply_float8(nn.Linear(16, 16), "rowwise", context)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ps.ConfigurationError, match="got compute capability 8.0, expected at least 8.9"):
        apply_float8(nn.Linear(16, 16), "rowwise", replace(context, device=torch.device("cuda", 0)))
