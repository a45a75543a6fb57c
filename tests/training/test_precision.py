"""Mixed precision on every engine: the loss follows a float64 run, and no update is lost to rounding.

The reference is transformers in float64 on one process. A run without masters is 5e-2 from it in the mean; every
supported precision stays within a tenth of that.
"""

import pytest
import torch
import transformers
from support.models.tiny import save_tiny
from support.workers.precision import STEPS, curves, losses_of_transformers_model, small_updates

import polyshard as ps
from polyshard.testing import run_ranks

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASTS, HALF = ps.Precision(compute=BF16), ps.Precision(parameters=BF16)
REDUCED = ps.Precision(parameters=BF16, reduce=BF16)
SCALED = ps.Precision(compute=F16)
DDP, FSDP = {"data_parallel": "ddp"}, {"data_parallel": "fsdp"}
ZERO = [{"zero_stage": stage} for stage in range(4)]
# precision, options of the engine, micro-batches
CASES = {
    "torch": [
        *((CASTS, DDP, 1), (CASTS, DDP, 2), (CASTS, FSDP, 1), (CASTS, FSDP, 2), (HALF, DDP, 1), (HALF, DDP, 2)),
        *((REDUCED, DDP, 1), (SCALED, DDP, 1), (SCALED, FSDP, 1)),
    ],
    "megatron": [
        *((HALF, ZERO[0], 1), (HALF, ZERO[1], 1), (HALF, ZERO[1], 2), (REDUCED, ZERO[1], 1)),
        (ps.Precision(parameters=F16), ZERO[1], 1),
    ],
    "deepspeed": [
        *((CASTS, options, 1) for options in ZERO),
        *((HALF, options, 1) for options in ZERO[1:]),
        (HALF, ZERO[2], 2),
    ],
    "fairscale": [
        *((CASTS, options, 1) for options in ZERO[1:3]),
        *((REDUCED, options, 1) for options in ZERO[1:3]),
        (SCALED, ZERO[1], 1),
    ],
}
BAND = 5e-3  # mean distance of the losses from those in float64


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model whose weights are bfloat16 numbers: every precision starts from the same ones."""
    path = save_tiny(tmp_path_factory.mktemp("precision") / "model", "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=BF16)
    model.float().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    return torch.tensor(losses_of_transformers_model(model, STEPS), dtype=torch.float64)


@pytest.mark.parametrize("adapter", CASES)
def test_losses_follow_a_float64_run(directory, reference, adapter):
    results = run_ranks(curves, 2, directory, adapter, CASES[adapter], timeout=280)
    assert results[0] == results[1]  # the same loss on every rank
    for case, losses in zip(CASES[adapter], results[0]):
        distance = (torch.tensor(losses, dtype=torch.float64) - reference).abs()
        assert distance.mean() < BAND, case
    assert reference[-1] < 0.6 * reference[0]


def test_a_run_without_masters_leaves_the_band(directory, reference):
    """The band can tell: this is what the engines refuse to do unless it is asked for."""
    without = ps.Precision(parameters=BF16, reduce=BF16, optimizer=BF16)
    ((losses,),) = run_ranks(curves, 1, directory, "torch", [(without, DDP, 1)])
    assert (torch.tensor(losses, dtype=torch.float64) - reference).abs().mean() > 3 * BAND


@pytest.mark.parametrize("adapter", CASES)
def test_updates_below_the_rounding_of_bfloat16_survive(adapter):
    cases = [case for case in CASES[adapter] if case[2] == 1 and case[0].has_masters and not case[0].scales_loss]
    cases = cases or [case for case in CASES[adapter] if case[2] == 1][:1]
    for index, (case, *values) in enumerate(zip(cases, *run_ranks(small_updates, 2, adapter, cases, timeout=280))):
        held = [value for value in values if value is not None]
        assert held == pytest.approx([0.98 if index else 0.9] * len(held), abs=1e-3), case
        assert held, case
