"""Every code block of the README is run; make targets and the installation are checked against the Makefile."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


def test_there_is_no_block_that_this_file_does_not_know():
    assert {name for name, _ in BLOCKS} == {"bash", "python", "mermaid"}


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_are_targets_of_the_makefile(target):
    assert f"make {target}\n" in blocks("bash")
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert {"demo": "examples/demo.py", "test": "pytest"}[target] in done.stdout


def test_the_installation_is_what_the_makefile_does():
    (install,) = [b for b in blocks("bash") if b.startswith("pip install")]
    makefile = (ROOT / "Makefile").read_text()
    for line in install.strip().splitlines():
        assert line.removeprefix("pip install ") in makefile
        for name in re.findall(r"requirements/\S+", line):
            assert (ROOT / name).is_file()


@pytest.mark.vllm
def test_the_thirty_lines_train_and_serve(tmp_path):
    for block in blocks("python"):
        name = re.match(r"# (\w+\.py)\n", block).group(1)
        (tmp_path / name).write_text(block)
        ast.parse(block)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": ""}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    printed = {}
    for command in ("torchrun --nproc-per-node 2 train.py", "python serve.py"):
        assert f"{command}\n" in blocks("bash")
        done = subprocess.run(command.split(), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-5000:]
        printed[command] = done.stdout
    assert "[24, 25, 26, 27, 28, 29, 30, 31]" in printed["python serve.py"]
    known = {f"{c}\n" for c in ("make demo", "make test", "torchrun --nproc-per-node 2 train.py", "python serve.py")}
    assert all(b in known or b.startswith("pip install") for b in blocks("bash"))


def test_every_link_leads_to_a_file():
    for folder, text in [(ROOT, README), *((p.parent, p.read_text()) for p in (ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), f"{target} in {folder}"
