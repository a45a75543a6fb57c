"""What is admitted is tested: one range for each library, a warning outside of it, a refusal of known faults."""

import itertools
import tomllib
import warnings
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement as Named
from packaging.specifiers import SpecifierSet
from support.paths import ROOT

import polyshard as ps
from polyshard.adapters.torch.float8 import TORCHAO
from polyshard.core import requirement as module
from polyshard.core.requirement import Requirement, UntestedVersionWarning
from polyshard.lora.requirement import PEFT
from polyshard.ray.requirement import REQUIREMENT as RAY
from polyshard.transformers.replaced.requirement import TRANSFORMERS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared():
    """Ranges of pyproject.toml by distribution."""
    lines = itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    found = {}
    for line in map(Named, lines):
        found.setdefault(line.name, []).append(line.specifier)
    return found


NEEDED = {name: ps.load_adapter(name).requirement for name in ps.adapter_names()} | {
    "transformers": TRANSFORMERS,
    "peft": PEFT,
    "torchao": TORCHAO,
    "ray": RAY,
}


@pytest.mark.parametrize("library", NEEDED)
def test_pyproject_has_the_range_of_the_requirement(library):
    needed, ranges = NEEDED[library], declared()
    for distribution in needed.distributions:
        assert set(ranges[distribution]) == {SpecifierSet(needed.supported)}, distribution
    assert needed.tested
    assert all(needed.supports(tested) for tested in needed.tested)


def fake(**changes):
    settings = {"title": "Torch", "module": "torch", "distributions": ("torch",), "tested": ("1.0",), "install": ""}
    return Requirement(**{**settings, **changes})


def test_a_version_outside_the_range_warns_once_and_one_inside_never():
    outside = fake(supported="<1")
    with pytest.warns(UntestedVersionWarning, match=r"Torch .* is untested: polyshard supports <1 "):
        outside.require()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outside.require()
        fake(supported=">=2").require()
        fake().require()


def test_a_version_with_a_known_fault_is_refused_by_its_reason():
    faulty = fake(supported=">=2", refused=((f"=={version('torch')}", "it forgets the cache"),))
    with pytest.raises(ps.UnsupportedVersionError, match="Torch .* is unsupported: it forgets the cache. Install"):
        faulty.require()
    assert fake(supported=">=2", refused=(("<1", "it forgets the cache"),)).refusal("2.0") is None


def test_a_version_that_is_none_is_outside_of_every_range(monkeypatch):
    monkeypatch.setattr(module, "version", lambda name: "from my branch")
    with pytest.warns(UntestedVersionWarning, match="from my branch is untested"):
        fake(supported=">=2", title="Branch").require()
