"""An adapter installed as a package of its own is found by its entry point, and passes the suite from the wheel."""

import os
import subprocess
import sys

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.slow

PACKAGE = ROOT / "tests" / "thirdparty"


def run(command, **environment):
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, **environment})
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_an_installed_third_party_adapter_conforms(tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*pip, "--target", str(tmp_path / "site"), str(PACKAGE)])
    paths = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    listed = run([sys.executable, "-c", "import polyshard as ps; print(ps.adapter_names())"], PYTHONPATH=paths)
    assert "'example'" in listed
    suite = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(PACKAGE / "conformance.py")]
    printed = run(suite, PYTHONPATH=paths)
    assert " passed" in printed
    assert "failed" not in printed
