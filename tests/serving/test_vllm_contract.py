"""All that polyshard relies on in vLLM, by name and signature: a new vLLM breaks this file with a readable message."""

import subprocess
import sys
import zipfile

import pytest
from support.paths import TOOLS

pytestmark = pytest.mark.vllm

TOOL = TOOLS / "vllm_contract.py"


def test_the_installed_vllm_has_all_that_we_rely_on():
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_a_new_vllm_lacks_is_named(tmp_path):
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("from vllm.config import VllmConfig\n")
    done = subprocess.run([sys.executable, TOOL, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "vllm has no ModelRegistry" in done.stdout
    assert "vllm.model_executor.layers.layernorm has no RMSNorm.__init__" in done.stdout


def test_general_plugins_are_loaded_by_entry_point():
    from importlib.metadata import entry_points

    from vllm.plugins import DEFAULT_PLUGINS_GROUP

    assert DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"
    (plugin,) = [p for p in entry_points(group=DEFAULT_PLUGINS_GROUP) if p.name == "polyshard"]
    assert callable(plugin.load())


def test_registry_and_model_protocol():
    import decoder
    from vllm import ModelRegistry
    from vllm.model_executor.models.interfaces_base import is_text_generation_model, is_vllm_model

    from polyshard.adapters.vllm.served.model import make_model_class
    from polyshard.core.serving import RegisteredModel

    cls = make_model_class(RegisteredModel(name="Contract", reference="decoder:build_model"), decoder.build_model)
    assert is_vllm_model(cls)
    assert is_text_generation_model(cls)
    assert callable(ModelRegistry.register_model)


def test_a_releases_python_is_laid_over_the_installed_operators(tmp_path):
    wheel = tmp_path / "vllm-9.0.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: vllm\nVersion: 9.0.0\nRequires-Dist: torch==99.0\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/__init__.py", "new = True\n")
        archive.writestr("vllm/_C.abi3.so", "for CUDA")
        archive.writestr("vllm-9.0.0.dist-info/METADATA", metadata)
    command = [sys.executable, TOOLS / "vllm_overlay.py", wheel, tmp_path / "overlay"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch==99.0, here" in done.stdout
    operators = list((tmp_path / "overlay" / "vllm").glob("_C*.so"))
    assert operators
    assert all(path.read_bytes() != b"for CUDA" for path in operators)
    (information,) = (tmp_path / "overlay").glob("*.dist-info")
    assert information.name == "vllm-9.0.0+cpu.dist-info"
    assert "Version: 9.0.0+cpu" in (information / "METADATA").read_text()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert "is not empty" in again.stderr
