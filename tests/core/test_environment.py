import re
from pathlib import Path

import pytest
import torch

import polyshard as ps
from polyshard.attention import select_kernel
from polyshard.core.attention import AttentionSpec
from polyshard.core.environment import MATMUL, VARIABLES

PACKAGE = Path(ps.__file__).parent


def test_every_variable_of_the_sources_is_in_the_table():
    named = {name for file in PACKAGE.rglob("*.py") for name in re.findall(r"\bPOLYSHARD_[A-Z]+\b", file.read_text())}
    known = {variable.name for variable in VARIABLES} | {v.former_name for v in VARIABLES if v.former_name}
    assert named == known


def test_a_former_variable_and_a_former_value_are_read_with_a_warning(monkeypatch):
    monkeypatch.setenv("POLYSHARD_PRODUCT", "compiled")
    with pytest.warns(DeprecationWarning, match="POLYSHARD_PRODUCT is deprecated .* Use POLYSHARD_MATMUL"):
        assert MATMUL.read() == "native"
    monkeypatch.setenv("POLYSHARD_MATMUL", "vllm")
    assert MATMUL.read() == "vllm"  # the present name comes first


def test_a_former_kernel_name_selects_the_kernel_with_a_warning():
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=16, scale=0.3)
    present = select_kernel(spec, torch.device("cpu"), torch.float32, True, "cpu_native")
    with pytest.warns(DeprecationWarning, match="'cpu_fused' is deprecated .* Use 'cpu_native'"):
        assert select_kernel(spec, torch.device("cpu"), torch.float32, True, "cpu_fused") is present
