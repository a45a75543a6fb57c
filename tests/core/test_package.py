"""What importing polyshard costs, and whom it lets in."""

import importlib.util
import subprocess
import sys

import pytest
from support.paths import ROOT

import polyshard as ps
from polyshard.core.capabilities import FEATURES

VENDORS = {"vllm", "megatron", "deepspeed", "fairscale", "flash_attn", "transformers", "peft", "typer", "rich"}
VENDORS |= {"torchao"}


def modules_after(statement):
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_polyshard_imports_no_vendor():
    loaded = modules_after("import polyshard")
    assert not loaded & VENDORS


def test_using_the_torch_adapter_imports_no_vendor():
    use = "import polyshard as ps; ps.column_parallel(4, 4, ps.initialize('torch')); ps.TrainableFlashAttention(8, 2)"
    assert not modules_after(use) & VENDORS


@pytest.mark.parametrize("library", ["megatron", "deepspeed", "fairscale"])
def test_using_one_library_imports_no_other(library):
    use = f"import polyshard as ps; c = ps.initialize({library!r}); ps.column_parallel(4, 4, c); ps.shutdown(c)"
    assert modules_after(use) & VENDORS == {library}


def test_loading_the_vllm_adapter_imports_no_vllm():
    assert "vllm" not in modules_after("import polyshard as ps; ps.load_adapter('vllm').capabilities")


def test_importing_polyshard_costs_under_50_ms_beyond_torch():
    code = "import torch, time; t = time.perf_counter(); import polyshard; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.05


def test_every_public_name_exists():
    """Those that need vLLM say how to install it where it is missing."""
    missing = importlib.util.find_spec("vllm") is None
    for name in ps.__all__:
        if missing and name in ("Rollout", "RolloutEngine", "SyncReport", "WeightSync", "LoraSync"):
            with pytest.raises(ps.MissingDependencyError, match=r"pip install 'polyshard\[vllm\]'"):
                getattr(ps, name)
        else:
            assert getattr(ps, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ps.nonsense


def test_an_unknown_adapter_lists_those_that_there_are_and_how_to_install_one():
    with pytest.raises(ps.AdapterError, match=r"unknown: got 'megatorn', expected one of .*torch, vllm\..*pip install"):
        ps.load_adapter("megatorn")


@pytest.mark.parametrize("name", ps.adapter_names())
def test_every_adapter_answers_for_every_capability(name):
    adapter = ps.load_adapter(name)
    assert isinstance(adapter.capabilities, ps.Capabilities)
    assert {feature for feature, _ in adapter.capabilities} == set(FEATURES)
    assert all(s.available or s.reason for _, s in adapter.capabilities)


def test_what_an_adapter_cannot_do_is_refused_with_the_reason():
    with pytest.raises(ps.AdapterError, match=r"Adapter 'fairscale' does not support sequence parallel.*: .*\(never\)"):
        ps.load_adapter("fairscale").initialize(ps.ParallelLayout(tensor=2, sequence_parallel=True))
    with pytest.raises(ps.AdapterError, match="does not initialize training processes"):
        ps.initialize("vllm")


def test_the_torch_adapter_satisfies_the_protocols():
    from polyshard.core.linear_adapter import FullLinearAdapter

    adapter = ps.load_adapter("torch")
    assert isinstance(adapter, ps.Adapter)
    assert isinstance(adapter.linear, FullLinearAdapter)


def test_vllm_absent_is_said_with_the_command_that_installs_it(monkeypatch):
    from polyshard.core import requirement

    monkeypatch.setattr(requirement, "find_spec", lambda name: None)
    with pytest.raises(ps.MissingDependencyError, match=r"vLLM is not installed\. .*pip install 'polyshard\[vllm\]'"):
        _ = ps.load_adapter("vllm").server
    with pytest.raises(ps.MissingDependencyError, match=r"Megatron-Core is not installed\. .*'polyshard\[megatron"):
        ps.initialize("megatron")


def test_pages_that_are_made_from_the_code_are_current():
    done = subprocess.run([sys.executable, "-m", "tools.pages", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_api_reference_has_every_public_name_once():
    sys.path.insert(0, str(ROOT))
    from tools.pages.api import TOPICS

    named = [name for _, _, names in TOPICS.values() for name in names]
    assert len(set(named)) == len(named)
    assert {name for name in named if "." not in name} == set(ps.__all__) - {"__version__"}


def test_the_command_line_tells_the_version(capfd):
    from support.command_line import polyshard

    assert polyshard(capfd, "--version").stdout == f"polyshard {ps.__version__}\n"


def test_the_package_runs_as_the_command_line():
    command = [sys.executable, "-m", "polyshard"]
    run = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, f"polyshard {ps.__version__}\n"), run.stderr
