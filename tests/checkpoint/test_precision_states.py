"""No bit of a master is lost through save and load, in another library and in another precision."""

import pytest
import torch
from safetensors.torch import load_file
from support.models.tiny import save_tiny
from support.workers.precision import saved_and_moved

import polyshard as ps
from polyshard.testing import run_ranks

BF16 = torch.bfloat16
CASTS, HALF = ps.Precision(compute=BF16), ps.Precision(parameters=BF16)
REDUCED = ps.Precision(parameters=BF16, reduce=BF16)
DDP, FSDP = {"data_parallel": "ddp"}, {"data_parallel": "fsdp"}
CHAIN = [
    ("torch", HALF, DDP),
    ("torch", HALF, DDP),
    ("megatron", HALF, {"zero_stage": 1}),
    ("torch", CASTS, FSDP),
    ("deepspeed", HALF, {"zero_stage": 2}),
    ("fairscale", REDUCED, {"zero_stage": 1}),
    ("megatron", HALF, {"zero_stage": 0}),
    ("deepspeed", CASTS, {"zero_stage": 3}),
    ("torch", HALF, DDP),
]

OVERFLOWS = ps.Precision(compute=torch.float16, loss_scale=2.0**30)
SCALED = [("torch", OVERFLOWS, DDP), ("megatron", ps.Precision(parameters=torch.float16), {"zero_stage": 1})]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    states = [folder / str(index) for index in range(len(CHAIN))]
    directory = save_tiny(folder / "model", "llama")
    return states, *run_ranks(saved_and_moved, 2, directory, states, CHAIN, SCALED, timeout=280)[0]


def masters_of(state):
    """Each parameter in the widest dtype that a state holds it in."""
    weights = load_file(state / "model.safetensors")
    held = state / "training" / "master.safetensors"
    return {**weights, **(load_file(held) if held.exists() else {})}


def test_masters_keep_all_bits_through_every_library_and_precision(outcome):
    states, *_ = outcome
    first = masters_of(states[0])
    assert any(not torch.equal(value, value.to(BF16).float()) for value in first.values())
    for state, kind in zip(states[1:], CHAIN[1:]):
        found = masters_of(state)
        assert set(found) == set(first)
        for name, value in first.items():
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], value), (kind, name)


def test_weights_are_the_rounded_masters(outcome):
    for state, (_, precision, _) in zip(outcome[0], CHAIN):
        masters = masters_of(state)
        for name, value in load_file(state / "model.safetensors").items():
            assert value.dtype == precision.parameters
            assert torch.equal(value, masters[name].to(value.dtype))


def test_a_resumed_run_has_the_losses_of_the_unbroken_one(outcome):
    _, losses, _ = outcome
    assert losses[1] == losses[0]  # bit for bit in the same library and precision
    for resumed, kind in zip(losses[2:], CHAIN[2:]):
        assert resumed == pytest.approx(losses[0], abs=2e-2), kind


def test_the_loss_scale_continues_in_another_library(outcome):
    first, second = outcome[2]
    assert 1 < first["factor"] < OVERFLOWS.loss_scale  # it has overflowed
    assert second["factor"] == first["factor"]
    assert second["steps"] == first["steps"] == 1
