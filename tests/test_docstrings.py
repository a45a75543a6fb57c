"""The examples in docstrings, run in one process with `torch` and `polyshard as ps` at hand.

An example may use the names of its module. It runs in an empty directory, on one rank, without torchrun. A docstring is
allowed to skip an example (`+SKIP`) only if a comment beside it says what it needs: a vLLM engine, a GPU or torchrun.
"""

import doctest
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import polyshard as ps

PACKAGE = Path(ps.__file__).parent
VENDORS = {f"polyshard.adapters.{name}": name for name in ("vllm", "megatron", "deepspeed", "fairscale")}
VENDORS |= {"polyshard.transformers": "transformers", "polyshard.cli": "typer", "polyshard.lora": "peft"}
VENDORS |= {"polyshard.adapters.torch.float8": "torchao"}
VENDORS |= {f"polyshard.exact.{name}": "vllm" for name in ("context", "linear")}  # vLLM's operators
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def module_names() -> list[str]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>> " in path.read_text():
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            found.append(".".join(part for part in parts if part != "__init__"))
    return found


@pytest.mark.parametrize("name", module_names())
def test_examples_of_a_module(name, tmp_path, monkeypatch):
    for prefix, vendor in VENDORS.items():
        if name.startswith(prefix) and importlib.util.find_spec(vendor) is None:
            pytest.skip(f"needs {vendor}")
    monkeypatch.setattr(sys, "argv", [*sys.argv])  # an example sets it
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    failures: list[str] = []
    for number, example in enumerate(doctest.DocTestFinder(exclude_empty=True).find(module)):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        example.globs.update(torch=torch, ps=ps)
        torch.manual_seed(0)
        runner.run(example, out=failures.append)
    assert not failures, "".join(failures)


def test_public_names_have_examples():
    packages = ["polyshard", *(f"polyshard.{path.parent.name}" for path in sorted(PACKAGE.glob("*/__init__.py")))]
    missing = set()
    for package in packages:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):
            try:
                found = getattr(module, name)
            except ps.MissingDependencyError:  # vLLM's, which the environment of a run without it lacks
                assert importlib.util.find_spec("vllm") is None
                continue
            home = getattr(found, "__module__", "")
            documented = ">>> " in (found.__doc__ or "") or not (inspect.isclass(found) or inspect.isfunction(found))
            if home.startswith("polyshard.") and not documented:
                missing.add(f"{home}.{name}")
    assert not missing, f"public names without an example: {sorted(missing)}"


def test_examples_have_the_heading_by_which_the_site_renders_them_as_code():
    wrong = [str(path) for path in PACKAGE.rglob("*.py") if re.search(r"^\s*Example:$", path.read_text(), re.MULTILINE)]
    assert not wrong, f"Example: must be Examples: in {wrong}"


def test_a_skipped_example_says_what_it_needs():
    for path in PACKAGE.rglob("*.py"):
        for line in path.read_text().splitlines():
            if "+SKIP" in line:
                # Before the directive, since doctest reads everything after it as options.
                assert re.search(r"# needs .*(vLLM|GPU|torchrun|Ray).*# doctest: \+SKIP", line), f"{path}: {line}"
