"""All that polyshard relies on in vLLM, by name and signature: a new vLLM breaks this file with a readable message."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm

TOOL = Path(__file__).resolve().parents[1] / "tools" / "vllm_contract.py"


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

    from polyshard.adapters.vllm.model import make_model_class
    from polyshard.core.host import RegisteredModel

    cls = make_model_class(RegisteredModel(name="Contract", reference="decoder:build_model"), decoder.build_model)
    assert is_vllm_model(cls)
    assert is_text_generation_model(cls)
    assert callable(ModelRegistry.register_model)
