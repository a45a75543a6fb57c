"""Recomputed activations: gradients are equal bit for bit, with dropout, on every library and layout."""

import pytest
import torch
from support.models.tiny import save_tiny
from support.suite_engines import ENGINES
from support.workers.recompute import recomputed_steps
from torch import nn

import polyshard as ps
from polyshard.testing import run_ranks
from polyshard.training.recompute import apply_recomputation


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("recompute") / "model", "llama")


LAYOUTS = {
    "data 2": ({}, None),
    "tensor 2": ({"tensor": 2}, None),
    "sequence parallel 2": ({"tensor": 2, "sequence_parallel": True}, "sequence"),
    "context 2": ({"context": 2}, None),
}


@pytest.mark.parametrize("adapter", ENGINES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_after_two_steps_are_those_without_recomputation(directory, adapter, layout):
    sizes, feature = LAYOUTS[layout]
    if feature and not ps.load_adapter(adapter).capabilities[feature].available:
        pytest.skip(f"{adapter} has no {feature} parallel")
    engines = ENGINES[adapter] if layout == "data 2" else ENGINES[adapter][:1]
    for outcome in run_ranks(recomputed_steps, 2, directory, adapter, sizes, engines, timeout=280):
        for options, plain, *others in outcome:
            assert len(others) == 2
            for name, weight in plain.items():
                assert all(torch.equal(other[name], weight) for other in others), (options, name)


def test_unknown_modes_and_models_without_blocks_are_refused():
    with pytest.raises(ps.ConfigurationError, match="got 'some', expected one of 'none', 'selective', 'full'"):
        apply_recomputation(nn.Linear(2, 2), "some")
    with pytest.raises(ps.ConfigurationError, match="finds nothing to recompute in Linear"):
        apply_recomputation(nn.Linear(2, 2), "full")


def peak_bytes(directory, recompute):
    """Largest sum of live tensors that the profiler saw in one forward and backward pass."""
    from support.workers.on_ranks import build

    context = ps.initialize("torch")
    model = build(directory, context)
    undo = apply_recomputation(model, recompute)
    ids = torch.randint(0, 100, (4, 128), generator=torch.Generator().manual_seed(0))
    with torch.profiler.profile(profile_memory=True) as profile:
        model(ids, labels=ids).backward()
    undo()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    ps.shutdown(context)
    return peak


def test_full_recomputation_needs_less_memory_than_selective_and_that_less_than_none(tmp_path):
    directory = save_tiny(tmp_path / "model", "llama", num_hidden_layers=6)
    full, selective, none = (peak_bytes(directory, mode) for mode in ("full", "selective", "none"))
    assert 0 < full < selective < none
