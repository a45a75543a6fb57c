"""A cast that loses values says so: an error where a value is destroyed, a note where it is rounded to zero.

Sources: stas00/ml-engineering#41 and kingoflolz/mesh-transformer-jax#21 (infinities in float16 files).
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models.tiny import save_tiny

import polyshard as ps
from polyshard.convert import convert
from polyshard.convert.casting import Casts, checked_cast

NORM, MATRIX = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


def _changed(tmp_path, dtype, change):
    source = save_tiny(tmp_path / "a", "llama")
    state = {name: value.to(dtype) for name, value in load_file(source / "model.safetensors").items()}
    change(state)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    return source


def _set(name, index, value):
    def change(state):
        state[name][index] = value

    return change


REFUSED = {
    "overflow in a vector": (
        torch.bfloat16,
        _set(NORM, 0, 1e5),
        torch.float16,
        f"{NORM} overflows in float16: got 99840",
    ),
    "overflow in a matrix": (
        torch.float32,
        _set(MATRIX, (3, 4), -7e4),
        torch.float16,
        f"{MATRIX} overflows in float16",
    ),
    "rounding to infinity": (torch.float32, _set(NORM, 0, 65520.0), torch.float16, f"{NORM} overflows in float16"),
    "beyond bfloat16": (torch.float32, _set(NORM, 0, 3.4e38), torch.bfloat16, f"{NORM} overflows in bfloat16"),
    "beyond float32": (torch.float64, _set(NORM, 0, 1e300), torch.float32, f"{NORM} overflows in float32: got 1e.300"),
    "a subnormal element": (torch.bfloat16, _set(NORM, 1, 1e-6), torch.float16, f"{NORM} becomes subnormal in float16"),
    "a subnormal row": (
        torch.float32,
        _set(MATRIX, 5, 1.3e-7),
        torch.float16,
        f"{MATRIX} becomes subnormal in float16",
    ),
    "a vector of nothing": (
        torch.float32,
        _set(NORM, slice(None), 1e-9),
        torch.float16,
        f"{NORM} becomes zero in float16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("verify", [False, True])
def test_a_value_that_the_dtype_cannot_hold_is_refused_and_nothing_is_published(tmp_path, case, verify):
    dtype, change, target, message = REFUSED[case]
    source = _changed(tmp_path, dtype, change)
    with pytest.raises(ps.CheckpointError, match=f"{message}.*Use --dtype"):
        convert(source, tmp_path / "b", dtype=target, verify=verify)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_value_that_becomes_zero_beside_larger_ones_is_a_note(tmp_path):
    source = _changed(tmp_path, torch.bfloat16, _set(NORM, 2, 1e-12))
    done = convert(source, tmp_path / "b", dtype=torch.float16, verify=True)
    assert any("became zero" in note and "in float16" in note for note in done.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_ordinary_weights_are_cast_and_the_configuration_says_so(tmp_path, dtype):
    import json

    source = save_tiny(tmp_path / "a", "llama")
    done = convert(source, tmp_path / "b", dtype=dtype, verify=True)
    found = load_file(tmp_path / "b" / "model.safetensors")
    assert all(
        torch.equal(found[name], value.to(dtype)) for name, value in load_file(source / "model.safetensors").items()
    )
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert done.logits == 0.0


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_gives_torchs_values_or_refuses(source, target):
    """Every finite value of both dtypes' ranges: what is finite and not tiny stays so."""
    exponents = torch.linspace(-37, 37, 500, dtype=torch.float64)
    for value in (10.0**exponents).to(source):
        casts = Casts(target)
        vector = torch.tensor([1.0, float(value)], dtype=torch.float64).to(source)
        wanted = vector.to(target)
        try:
            found = checked_cast("x", vector, casts)
        except ps.CheckpointError:
            limits = torch.finfo(target)
            assert not wanted.isfinite().all() or float(wanted[1]) < limits.smallest_normal
            continue
        assert torch.equal(found, wanted)
        assert found.isfinite().all() or not vector.isfinite().all()
        assert bool(casts.notes()) or float(vector[1]) == 0 or float(found[1]) != 0


def test_parts_of_one_tensor_of_megatron_in_several_dtypes_are_refused(tmp_path):
    def change(state):
        state[MATRIX] = state[MATRIX].float()

    source = _changed(tmp_path, torch.bfloat16, change)
    with pytest.raises(ps.CheckpointError, match=rf"{MATRIX} in float32.* have different dtypes.*Pass --dtype"):
        convert(source, tmp_path / "b", to_format="megatron-torch-dist")
    convert(source, tmp_path / "b", to_format="megatron-torch-dist", dtype=torch.float32)


def test_infinities_that_are_there_already_are_kept(tmp_path):
    values = torch.tensor([1.0, torch.inf, torch.nan])
    assert torch.equal(checked_cast("x", values, Casts(torch.float16))[:2], values[:2].half())


def test_integers_are_not_cast_and_codes_are_refused(tmp_path):
    source = save_tiny(tmp_path / "a", "llama")
    file = source / "model.safetensors"
    state = load_file(file)
    save_file(state | {"steps": torch.tensor([3])}, file, metadata={"format": "pt"})
    convert(source, tmp_path / "b", dtype=torch.bfloat16)
    assert load_file(tmp_path / "b" / "model.safetensors")["steps"].dtype == torch.int64
    state[MATRIX] = state[MATRIX].to(torch.float8_e4m3fn)
    save_file(state, file, metadata={"format": "pt"})
    for settings in ({"dtype": torch.bfloat16}, {"to_format": "llama"}, {"to_format": "megatron-torch-dist"}):
        with pytest.raises(ps.CheckpointError, match=f"got {MATRIX} in (torch.)?float8_e4m3fn"):
            convert(source, tmp_path / "c", **settings)
    convert(source, tmp_path / "copied")
    assert load_file(tmp_path / "copied" / "model.safetensors")[MATRIX].dtype == torch.float8_e4m3fn
