"""Compiled blocks train as eager ones, on every library, in one graph for all layers, lengths and packings."""

import dataclasses

import moe
import pytest
import torch
from support.models.experts import VOCAB as MOE_VOCAB
from support.models.experts import moe_config
from support.models.tiny import VOCAB, save_tiny, tiny_config
from support.workers.compiled import (
    compiled_steps,
    model_with,
    packed_batches,
    rank_that_crashes_in_a_compiled_block,
    state_of_compiled_into_eager,
    trained,
)
from torch import nn

import polyshard as ps
from polyshard.core.pipeline_plan import PipelinePlan
from polyshard.core.stages import Stages
from polyshard.testing import run_ranks
from polyshard.training.compile import apply_compile


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("compile") / "model", "llama")


def assert_equal_within_rounding(eager, compiled):
    torch.testing.assert_close(compiled["losses"], eager["losses"], rtol=0, atol=2e-6)
    torch.testing.assert_close(compiled["norms"], eager["norms"], rtol=1e-5, atol=0)
    for name, weight in eager["weights"].items():
        apart = (compiled["weights"][name] - weight).abs()
        # AdamW divides by the gradient's size: where a gradient is nearly zero, its rounding is a part of the step.
        assert (apart > 2e-6).sum() <= 1e-3 * apart.numel(), name
        assert apart.max() <= 0.1 * 1e-3, f"{name}: a tenth of the learning rate"


ENGINES = {
    "torch": {"data_parallel": "fsdp"},
    "megatron": {"zero_stage": 1},
    "deepspeed": {"zero_stage": 2},
    "fairscale": {"zero_stage": 2},
}


@pytest.mark.parametrize("adapter", ENGINES)
def test_engines_of_every_library_train_as_without_compilation(directory, adapter):
    cases = [ENGINES[adapter], {**ENGINES[adapter], "compile": True}]
    for (eager, compiled), warnings in run_ranks(compiled_steps, 2, directory, adapter, {}, cases, timeout=280):
        assert_equal_within_rounding(eager, compiled)
        assert (compiled["graphs"], compiled["breaks"], eager["graphs"]) == (1, 0, 0)
        assert not warnings


def test_generated_code_with_sequence_parallel_has_one_graph_and_the_collectives_of_eager(directory):
    cases = [{"compile": False}, {"compile": True}, {"compile": True, "recompute": "selective"}]
    sizes = {"tensor": 2, "sequence_parallel": True}
    ranks = run_ranks(compiled_steps, 2, directory, "torch", sizes, cases, "inductor", timeout=280)
    for (eager, compiled, selective), warnings in ranks:
        for other in (compiled, selective):
            assert_equal_within_rounding(eager, other)
            assert (other["graphs"], other["breaks"]) == (1, 0)
        assert compiled["collectives"] == selective["collectives"] == eager["collectives"]
        assert not warnings


def test_libraries_whose_layers_break_the_graph_warn_once_and_train_as_without_compilation(directory):
    cases = [{"compile": False}, {"compile": True}]
    ranks = run_ranks(compiled_steps, 2, directory, "megatron", {"tensor": 2}, cases, "aot_eager", 1, timeout=280)
    for (eager, compiled), warnings in ranks:
        assert_equal_within_rounding(eager, compiled)
        assert compiled["breaks"]
        (warning,) = warnings
        assert "2 modules (Block)" in warning
        assert "async_op=True for distributed collectives" in warning


def test_blocks_of_pipeline_stages_train_as_without_compilation(directory):
    arguments = directory, "torch", {"pipeline": 2}, [{}, {"compile": True, "recompute": "full"}], "aot_eager", 2
    for (eager, compiled), warnings in run_ranks(compiled_steps, 2, *arguments):
        assert_equal_within_rounding(eager, compiled)
        assert (compiled["graphs"], compiled["breaks"]) == (1, 0)
        assert not warnings


@pytest.mark.parametrize(("way", "whole"), [("ulysses", True), ("ring", False)])
def test_context_parallel_is_compiled_with_ulysses_and_around_ring_attention(directory, way, whole):
    cases = [{"compile": False}, {"compile": True}]
    ranks = run_ranks(ring_or_ulysses, 2, directory, cases, way, timeout=280)
    for (eager, compiled), warnings in ranks:
        assert_equal_within_rounding(eager, compiled)
        assert (compiled["breaks"] == 0) == whole
        assert len(warnings) == (0 if whole else 1)
        assert all("ring attention exchanges keys and values" in warning for warning in warnings)


def ring_or_ulysses(directory, cases, way):
    return compiled_steps(directory, "torch", {"context": 2}, cases, steps=1, context_parallel=way)


def test_a_state_saved_by_a_compiled_engine_continues_in_an_eager_one_of_another_library(directory, tmp_path):
    for continued, resumed in run_ranks(state_of_compiled_into_eager, 2, directory, tmp_path / "state"):
        assert continued["graphs"] == 1
        # Libraries name the head's weight differently.
        named = dict(zip(continued["weights"], resumed["weights"].values(), strict=True))
        assert_equal_within_rounding({**resumed, "weights": named}, continued)


def test_a_rank_that_crashes_while_others_wait_in_compiled_code_is_named(directory):
    error, _ = run_ranks(rank_that_crashes_in_a_compiled_block, 2, directory, silent=(1,))
    assert "rank 0: tensor all_reduce failed" in error
    assert "rank 1 crashed, hung, or cannot be reached" in error


@pytest.fixture
def captured(monkeypatch, compiles):
    """torch.compile captures graphs and runs them without generating code."""
    compiled = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend="aot_eager"))


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("inside", [False, True])
def test_recomputation_outside_and_inside_of_a_compiled_block_repeats_its_random_numbers(directory, inside):
    context = ps.initialize("torch")
    outcomes = []
    recompute = (lambda module: type(module) is ps.TrainableFlashAttention) if inside else "full"
    for options in ({}, {"compile": True}, {"compile": True, "recompute": recompute}):
        model = model_with(directory, context)
        for block in model.model.layers:
            block.self_attn._call_spec = dataclasses.replace(block.self_attn._call_spec, dropout=0.3)
        engine = ps.load_adapter("torch").engine(model, ps.AdamW(lr=1e-3), context, **options)
        outcomes.append(trained(engine, packed_batches(context)))
        engine.close()
    eager, compiled, recomputed = outcomes
    assert_equal_within_rounding(eager, compiled)
    assert_equal_within_rounding(compiled, recomputed)
    assert compiled["breaks"] == recomputed["breaks"] == 0


@pytest.mark.usefixtures("captured")
def test_transformers_models_have_no_graph_break_and_find_packed_sequences_in_it():
    context, config = ps.initialize("torch"), tiny_config("llama")
    rows = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    restarts = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2], list(range(12))])
    batches = [{"input_ids": rows}, {"input_ids": rows[:, :9]}, {"input_ids": rows, "positions": restarts}]
    outcomes = []
    for compile in (False, True):
        model = ps.transformers_model(config, context)
        ps.initialize_weights(model, context, seed=0)
        engine = ps.load_adapter("torch").engine(model, ps.AdamW(lr=1e-3), context, compile=compile)
        outcomes.append(trained(engine, [{**batch, "labels": batch["input_ids"]} for batch in batches]))
    assert_equal_within_rounding(*outcomes)
    assert (outcomes[1]["graphs"], outcomes[1]["breaks"]) == (2, 0)  # positions that rows share have other strides


@pytest.mark.usefixtures("captured")
def test_experts_run_outside_of_the_graph_and_the_warning_says_why(caplog):
    context, config = ps.initialize("torch"), moe_config("qwen3_moe")
    ids = torch.randint(0, MOE_VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    outcomes = []
    for compile in (False, True):
        model = moe.build_model(config, context)
        ps.initialize_weights(model, context, seed=0)
        engine = ps.load_adapter("torch").engine(model, ps.AdamW(lr=1e-3), context, compile=compile)
        outcomes.append(trained(engine, [{"input_ids": ids, "labels": ids.roll(-1, 1)}]))
        engine.close()
    assert_equal_within_rounding(*outcomes)
    assert "the numbers of tokens of experts depend on the routing" in caplog.text


@pytest.mark.usefixtures("captured")
def test_a_function_chooses_modules_whose_names_stay_and_closing_restores_them(directory):
    context = ps.initialize("torch")
    model = model_with(directory, context)
    names = list(model.state_dict())
    chosen = [block.mlp for block in model.model.layers]
    engine = ps.load_adapter("torch").engine(
        model, ps.AdamW(), context, compile=lambda module: any(module in mlp.modules() for mlp in chosen)
    )
    assert list(model.state_dict()) == names
    replaced = [module for module in model.modules() if "forward" in module.__dict__]
    assert replaced == chosen, "modules inside a chosen module are a part of it"
    engine.close()
    assert not any("forward" in module.__dict__ for module in model.modules())


def refused(adapter, model, context=None, **options):
    context = context or ps.initialize("torch")
    with pytest.raises(ps.ConfigurationError) as error:
        ps.load_adapter(adapter).engine(model, ps.AdamW(), context, **options)
    return str(error.value)


def test_what_cannot_be_compiled_is_refused_with_the_reason():
    model = nn.ModuleList([nn.Linear(2, 2)])
    assert "got 'blocks', expected True, False or a function" in refused("torch", model, compile="blocks")
    assert "finds nothing to compile in Linear" in refused("torch", nn.Linear(2, 2), compile=True)
    assert "hooks gather parameters" in refused("deepspeed", model, zero_stage=3, compile=True)
    stages = Stages([model], (0,), PipelinePlan(schedule="zero-bubble-v", bounds=(0, 1), placement=(0,)))
    with pytest.raises(ps.ConfigurationError, match="with zero-bubble-v: .* of a compiled block both times in full"):
        apply_compile(stages, True)
    context = dataclasses.replace(ps.initialize("torch"), exact=object())
    assert "unsupported in exact mode" in refused("torch", model, context, compile=True)


def test_a_process_in_which_torch_compile_is_disabled_says_so(caplog):
    with torch._dynamo.config.patch(disable=True):
        apply_compile(nn.ModuleList([nn.Linear(2, 2)]), True)
    assert "compile has no effect: TORCH_COMPILE_DISABLE" in caplog.text
