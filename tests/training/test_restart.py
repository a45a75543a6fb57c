"""A run that is killed and started again computes what one that was not killed does, bit for bit.

Every library trains with dropout, packed documents, accumulation, the loss in chunks, recomputation, and states that
hold the position of the loader. The processes kill themselves by SIGKILL between two micro-batches and while they save.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.models.tiny import save_tiny
from support.workers.restarted import STEPS, Case, restarted, restarted_then_killed, train, undisturbed_then_killed

import polyshard as ps
from polyshard.launch.ranks import RankError
from polyshard.testing import run_ranks

BF16 = torch.bfloat16
MASTERS, CASTS, PLAIN = ps.Precision(parameters=BF16), ps.Precision(compute=BF16), ps.Precision()
REDUCED = ps.Precision(parameters=BF16, reduce=BF16)
AGAIN = {"recompute": "full"}
# Case 0 runs before and after case 1 in one process, whose settings must not stay behind.
CASES = {
    "torch": [
        Case("torch", MASTERS, {"data_parallel": "ddp", **AGAIN}, asynchronous=False),
        Case("torch", CASTS, {"data_parallel": "fsdp"}, asynchronous=True),
    ],
    "megatron": [
        Case("megatron", MASTERS, {"zero_stage": 1, **AGAIN}, asynchronous=True),
        Case("megatron", PLAIN, {"zero_stage": 1}, asynchronous=False),
    ],
    "deepspeed": [
        Case("deepspeed", MASTERS, {"zero_stage": 2, **AGAIN}, asynchronous=False),
        Case("deepspeed", CASTS, {"zero_stage": 1}, asynchronous=True),
    ],
    "fairscale": [
        Case("fairscale", REDUCED, {"zero_stage": 2, **AGAIN}, asynchronous=True),
        Case("fairscale", CASTS, {"zero_stage": 2}, asynchronous=False),
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("restart") / "model", "llama", attention_dropout=0.1)


def lines_of(run):
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


def tensors_of(state):
    files = sorted(path.relative_to(state) for path in state.rglob("*.safetensors"))
    return {f"{file}/{name}": value for file in files for name, value in load_file(state / file).items()}


@pytest.mark.parametrize("library", CASES)
def test_a_killed_run_continues_bit_for_bit(model, tmp_path, library):
    arguments = (2, tmp_path, model, CASES[library])
    with pytest.raises(RankError, match="exited with code -9"):
        run_ranks(undisturbed_then_killed, *arguments)
    with pytest.raises(RankError, match="exited with code -9"):
        run_ranks(restarted_then_killed, *arguments)
    run_ranks(restarted, *arguments)

    for index, resumed_at in enumerate((4, 2)):
        whole, killed = tmp_path / f"whole-{index}", tmp_path / f"killed-{index}"
        assert (whole / "begun").read_text().split() == ["0"]
        assert (killed / "begun").read_text().split() == ["0", str(resumed_at)]
        expected, found = lines_of(whole), lines_of(killed)
        assert [line["step"] for line in found] == list(range(1, STEPS + 1)), "no step is missing or stands twice"
        assert len({line["loss"] for line in expected}) == STEPS
        for name in ("loss", "grad_norm", "labels", "tokens", "model_flops", "skipped"):
            assert [line[name] for line in found] == [line[name] for line in expected], name
        last = [tensors_of(run / "states" / f"step-{STEPS:08d}") for run in (whole, killed)]
        assert last[0].keys() == last[1].keys()
        for name, value in last[0].items():
            assert torch.equal(value, last[1][name]), name
        left = {path.name for path in (killed / "states").iterdir()}
        assert left == {f"step-{step:08d}" for step in (2, 4, 6)}, "a killed save is cleared"


def test_a_run_continues_with_the_same_rows_on_one_rank(model, tmp_path):
    """Dropout draws other masks at another size; the rows, and so the number of labels, are the same."""
    case = CASES["torch"][0]
    run_ranks(train, 2, tmp_path / "two", model, case)
    shutil.copytree(tmp_path / "two" / "states" / "step-00000002", tmp_path / "one" / "states" / "step-00000002")
    train(tmp_path / "one", model, case)
    two, one = lines_of(tmp_path / "two")[2:], lines_of(tmp_path / "one")
    assert [line["step"] for line in one] == [3, 4, 5, 6]
    assert [line["labels"] for line in one] == [line["labels"] for line in two]
    assert len({line["labels"] for line in one}) > 2
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.05)
