"""The steps of the check, in order of value: what each runs on a GPU, and in its rehearsal on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "tools.gpu_check.pytest_lines", "-p", "no:cacheprovider")
LINES = "{lines}"  # replaced by the file that the command appends its rows to


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step.

    Attributes:
        name: what `--only` takes.
        title: what the table says.
        seconds: it is killed after this time.
        cuda: the command on a GPU.
        cpu: the command of the rehearsal, which takes seconds.
        needs_vllm_files: whether the command on a GPU imports vLLM's Python files, which need no compiled part.
        tests: whether the rows are pytest's, so that failed ones can be run again alone.
        environment: variables for the command.
    """

    name: str
    title: str
    seconds: float
    cuda: Sequence[str]
    cpu: Sequence[str]
    needs_vllm_files: bool = False
    tests: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def _pytest(*arguments: str, workers: int = 0) -> tuple[str, ...]:
    parallel = ("-n", str(workers)) if workers else ("-p", "no:xdist")
    return (*PYTEST, "--lines", LINES, *parallel, *arguments)


def _benchmark(script: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, f"benchmarks/{script}.py", *arguments, "--lines", LINES)


STEPS = (
    Step(
        name="doctor",
        title="polyshard doctor",
        seconds=40,
        cuda=(sys.executable, "-m", "tools.gpu_check.findings", LINES),
        cpu=(sys.executable, "-m", "tools.gpu_check.findings", LINES),
    ),
    Step(
        name="attention",
        title="attention kernels against float64",
        seconds=110,
        tests=True,
        cuda=_pytest("tests/cuda/test_attention_cuda.py", workers=8),
        cpu=_pytest("tests/attention/test_attention_kernels.py", "-k", "written_out and chunked-causal and float32"),
    ),
    Step(
        name="conformance",
        title="conformance suite: one rank over NCCL, two ranks on one GPU over gloo",
        seconds=140,
        tests=True,
        cuda=_pytest("tests/cuda/test_training_cuda.py", workers=8),
        cpu=_pytest("tests/adapters/test_conformance.py::TestTorch", "-k", "initialise_again or cross_entropy"),
    ),
    Step(
        name="training",
        title="training step of a Qwen3 with 0.6 B parameters, against transformers",
        seconds=110,
        cuda=_benchmark("training", "qwen3-0.6b", "--device", "cuda", "--rounds", "5"),
        cpu=_benchmark(
            *("training", "tiny", "--device", "cpu", "--dtype", "float32", "--loads", "2x16", "--rounds", "1"),
            "--no-compiled",
        ),
    ),
    Step(
        name="attention-speed",
        title="attention from 64 x 128 to 1 x 32k tokens, against torch's kernels",
        seconds=60,
        cuda=_benchmark("attention_lengths", "--device", "cuda", "--rounds", "3"),
        cpu=_benchmark("attention_lengths", "--device", "cpu", "--dtype", "float32", "--rounds", "1"),
    ),
    Step(
        name="exact",
        title="exact mode's operators that need no compiled part of vLLM",
        seconds=60,
        tests=True,
        needs_vllm_files=True,
        cuda=_pytest("tests/exact/test_exact_triton.py", workers=4),
        cpu=_pytest("tests/exact/test_exact.py", "-k", "row_of_a_product"),
    ),
    Step(
        name="checkpoints",
        title="checkpoints and fingerprints on the device",
        seconds=40,
        cuda=_benchmark("checkpoints", "qwen3-0.6b", "--device", "cuda", "--rounds", "2"),
        cpu=_benchmark("checkpoints", "tiny", "--device", "cpu", "--dtype", "float32", "--rounds", "1"),
    ),
)


def named(names: Sequence[str]) -> tuple[Step, ...]:
    """Return the steps of these names in the check's order; all for no names.

    Raises:
        SystemExit: a name is unknown.
    """
    known = [step.name for step in STEPS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown steps: {', '.join(unknown)}; expected some of {', '.join(known)}")
    return tuple(step for step in STEPS if not names or step.name in names)
