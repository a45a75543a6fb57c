"""The check for a GPU machine, rehearsed on the CPU; and what its runner does when steps fail or take too long."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

sys.path.insert(0, str(ROOT))

from tools.gpu_check import collect
from tools.gpu_check.runner import only_failed, run_steps
from tools.gpu_check.steps import LINES, STEPS, Step, named

pytestmark = pytest.mark.slow

WRITE = "import json, sys; open(sys.argv[1], 'a').write(json.dumps({}) + '\\n')"


def step(name, code, seconds=20.0, tests=False):
    command = (sys.executable, "-c", code, LINES)
    return Step(name=name, title=name, seconds=seconds, cuda=command, cpu=command, tests=tests)


def rows_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def rehearse(out, steps):
    names = [step.name for step in steps]
    command = [sys.executable, "-m", "tools.gpu_check", "run", "--device", "cpu", "--out", str(out)]
    done = subprocess.run([*command, "--only", ",".join(names)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + (out / "log.txt").read_text()[-4000:]
    rows = rows_of(out)
    assert [row["step"] for row in rows if "end" in row] == names
    return rows


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_the_steps_that_need_vllm_pass_in_the_rehearsal_on_the_cpu(tmp_path):
    rehearse(tmp_path, [step for step in STEPS if step.needs_vllm_files])


def test_the_rehearsal_passes_on_the_cpu(tmp_path):
    rows = rehearse(tmp_path, [step for step in STEPS if not step.needs_vllm_files])
    for name in ("training", "attention-speed", "checkpoints"):
        figures = [row for row in rows if row["step"] == name and "end" not in row]
        assert figures, f"{name} measured nothing"
        assert all(row["ratio" if name != "attention-speed" else "ms"] for row in figures)


def test_the_steps_of_a_gpu_run_fit_into_its_time_and_their_files_exist():
    assert sum(step.seconds for step in STEPS) <= 600
    for step in STEPS:
        for part in (*step.cuda, *step.cpu):
            if part.startswith(("tests/", "benchmarks/")):
                assert (ROOT / part.partition("::")[0]).exists(), part


def test_rows_of_a_step_that_is_killed_are_kept(tmp_path):
    slow = step("slow", WRITE.format({"measured": 1}) + "; import time; time.sleep(60)", seconds=2.0)
    outcomes = run_steps([slow, step("next", WRITE.format({"measured": 2}))], "cpu", tmp_path, 60, None)
    assert [outcome.status for outcome in outcomes] == ["timed out", "passed"]
    rows = rows_of(tmp_path)
    assert {"step": "slow", "measured": 1} in rows
    assert {"step": "next", "measured": 2} in rows
    assert "timed out" in (tmp_path / "table.txt").read_text()


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", "failed"),  # it measured nothing
        (WRITE.format({"measured": 1}) + "; sys.exit(3)", "failed"),
        (WRITE.format({"test": "a", "outcome": "skipped"}), "skipped"),
        (WRITE.format({"test": "[red]a", "outcome": "failed", "reason": "[/b] odd"}) + "; sys.exit(1)", "failed"),
    ],
)
def test_a_step_that_verified_nothing_has_not_passed(tmp_path, code, status):
    (outcome,) = run_steps([step("one", code)], "cpu", tmp_path, 60, None)
    assert outcome.status == status


def test_no_step_starts_after_the_budget_is_spent(tmp_path):
    code = WRITE.format({"measured": 1}) + "; import time; time.sleep(2)"
    outcomes = run_steps([step("first", code), step("second", code)], "cpu", tmp_path, 1.0, None)
    assert [outcome.status for outcome in outcomes] == ["timed out", "not run"]


def test_only_what_failed_is_run_again(tmp_path):
    rows = [
        *({"step": "doctor", "end": "passed"},),
        *({"step": "attention", "test": "tests/t.py::a", "outcome": "passed"},),
        *({"step": "attention", "test": "tests/t.py::b", "outcome": "failed"}, {"step": "attention", "end": "failed"}),
        *({"step": "training", "end": "timed out"},),
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = only_failed(named(["doctor", "attention", "training"]), tmp_path / "results.jsonl")
    assert [step.name for step in again] == ["attention", "training"]
    assert again[0].cuda[-1] == "tests/t.py::b"
    assert "tests/cuda/test_attention_cuda.py" not in again[0].cuda
    assert again[1].cuda == named(["training"])[0].cuda


def test_an_unknown_step_is_refused():
    with pytest.raises(SystemExit, match="unknown steps: speed; expected some of doctor, attention"):
        named(["speed"])


def test_vllms_python_files_travel_without_its_compiled_ones(tmp_path):
    pytest.importorskip("vllm", reason="needs vLLM")
    import zipfile

    collect.write_vllm_python(tmp_path / "vllm.zip")
    with zipfile.ZipFile(tmp_path / "vllm.zip") as archive:
        names = archive.namelist()
    assert "vllm/model_executor/determinism/batch_invariant.py" in names
    assert {Path(name).suffix for name in names} == {".py", ""}
    assert (tmp_path / "vllm.zip").stat().st_size < 20 << 20
