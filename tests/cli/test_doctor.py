"""`polyshard doctor` reports what can be used, and its exit status answers for what was asked."""

import functools
import json
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.command_line import polyshard

from polyshard.cli.doctor import Finding, show


@pytest.fixture
def doctor(capfd):
    return functools.partial(polyshard, capfd, "doctor")


def test_the_report_covers_every_adapter_and_kernel(doctor):
    done = doctor("--json")
    assert done.returncode == 0
    listed = json.loads(done.stdout)
    # vLLM is there twice: as an engine, and as its attention kernel.
    findings = {f["name"]: f for f in reversed(listed)}
    assert {"torch", "megatron", "deepspeed", "fairscale", "vllm", "cpu_flash", "chunked", "gloo"} <= set(findings)
    assert {"native matmul", "native attention"} <= set(findings)
    assert findings["vllm"]["kind"] == "serving"
    assert findings["peft"]["version"] == version("peft")
    assert findings["torchao"]["usable"] == (find_spec("torchao") is not None)
    assert findings["megatron"]["version"] == version("megatron-core")
    assert findings["torch_varlen"]["usable"] or findings["torch_varlen"]["detail"]
    assert all(f["detail"] for f in findings.values())


def test_the_exit_status_answers_for_what_was_asked(doctor):
    assert doctor("torch", "cpu_flash").returncode == 0
    unknown = doctor("jax")
    assert unknown.returncode == 1
    assert "unknown: jax. Pass one of: " in unknown.stderr


def test_the_table_is_readable():
    """As a user runs it."""
    command = [Path(sys.executable).with_name("polyshard"), "doctor"]
    printed = subprocess.run(command, capture_output=True, text=True).stdout
    assert "a version that polyshard is tested with" in printed
    assert all(len(line) <= 120 for line in printed.splitlines())


def test_brackets_in_a_detail_are_shown_and_not_taken_as_markup(capsys):
    show([Finding("serving", "vllm", False, None, "not installed: pip install 'polyshard[vllm]'")])
    assert "pip install 'polyshard[vllm]'" in capsys.readouterr().out


def test_a_missing_library_is_reported_with_its_command(monkeypatch):
    import polyshard.cli
    from polyshard.core import requirement

    monkeypatch.setattr(requirement, "find_spec", lambda name: None)
    assert polyshard.cli.main
    rows = {finding.name: finding for finding in sys.modules["polyshard.cli.doctor"].adapters()}
    assert not rows["megatron"].usable
    assert "pip install 'polyshard[megatron]'" in rows["megatron"].detail
