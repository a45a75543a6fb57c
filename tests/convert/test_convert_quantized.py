"""Quantized files as they are published: dequantized as transformers does, copied whole, or refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.oracles.conversions import ALLOW
from support.oracles.quantized_files import (
    KINDS,
    OTHERS,
    dequantized_by_transformers,
    gpt_oss_by_transformers,
    save_fp8_by_transformers,
    save_gpt_oss,
    save_other,
    save_quantized,
)

import polyshard as ps
from polyshard.checkpoint.quantization.dequantize import dequantized
from polyshard.convert import convert
from polyshard.convert.format import lazy

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_simple_rules_are_applied_as_transformers_applies_them(tmp_path, kind, dtype):
    if not kind.startswith("fp8"):
        pytest.importorskip("compressed_tensors")
    save_quantized(tmp_path / "a", kind)
    done = convert(tmp_path / "a", tmp_path / "b", dtype=dtype, verify=True)
    assert done.logits is not None, done.not_compared
    # In bfloat16 transformers rounds compressed-tensors' scales before it multiplies; polyshard rounds the product.
    found, wanted = (
        load_file(tmp_path / "b" / "model.safetensors"),
        dequantized_by_transformers(tmp_path / "a", kind, torch.float32),
    )
    assert set(found) == {name for name in wanted if not name.endswith("scale")}
    assert all(torch.equal(found[name], wanted[name].to(dtype)) for name in found)
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert any("dequantized 14 tensors" in note for note in done.notes)


@pytest.mark.parametrize("kind", ["fp8 in blocks", "float8 in blocks"])
def test_blocks_at_the_edge_of_a_matrix_are_cut(tmp_path, kind):
    """Like DeepSeek-V3's kv_a_proj of 576 rows; transformers stretches them, so the original is the oracle."""
    model = save_quantized(tmp_path / "a", kind, intermediate_size=200, hidden_size=160)
    convert(tmp_path / "a", tmp_path / "b", dtype=torch.float32)
    found = load_file(tmp_path / "b" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert (found[name] - value).abs().max() <= 2.0**-4 * value.abs().max(), name  # e4m3fn has three bits


def test_codes_of_compressed_tensors_own_compressor_are_its_decompressed_weights(tmp_path):
    """Also where the size of a block is written as text, as its older files have it."""
    library = pytest.importorskip("compressed_tensors")
    compressor = library.compressors.NaiveQuantizationCompressor
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "128x64", "symmetric": True}
    scheme = library.quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    value = torch.randn(256, 192)
    scale = value.reshape(2, 128, 3, 64).abs().amax((1, 3)) / 448
    codes = compressor.compress({"weight": value, "weight_scale": scale}, scheme)
    wanted = compressor.decompress(codes, scheme)["weight"]
    tensors = {f"up.{name}": lazy(tensor) for name, tensor in codes.items()}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    stated = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}
    found = dequantized(tensors, stated, "here").tensors
    assert list(found) == ["up.weight"]
    assert torch.equal(found["up.weight"].load(), wanted)
    assert torch.equal(found["up.weight"].part((100, 50), (100, 100)), wanted[100:200, 50:150])


def test_blocks_of_two_sizes_that_fit_the_same_scales_are_refused():
    """Nothing but the targets of the groups tells which of them a matrix has."""
    groups = {
        f"group_{width}": {"targets": ["Linear"], "weights": {"strategy": "block", "block_structure": [128, width]}}
        for width in (128, 96)
    }
    tensors = {
        "up.weight": lazy(torch.ones(128, 192).to(torch.float8_e4m3fn)),
        "up.weight_scale": lazy(torch.ones(1, 2)),
    }
    stated = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}
    with pytest.raises(ps.CheckpointError, match=r"scale of up.weight .* blocks of \[\(128, 128\), \(128, 96\)\]"):
        dequantized(tensors, stated, "here")


@pytest.mark.parametrize("to_format", ["llama", "megatron-torch-dist"])
def test_dequantized_weights_survive_a_chain(tmp_path, to_format):
    save_quantized(tmp_path / "a", "fp8 in blocks")
    convert(tmp_path / "a", tmp_path / "b", to_format=to_format, dtype=torch.bfloat16)
    convert(tmp_path / "b", tmp_path / "c", options=ALLOW)
    found = load_file(tmp_path / "c" / "model.safetensors")
    wanted = dequantized_by_transformers(tmp_path / "a", "fp8", torch.bfloat16)
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_mxfp4_is_dequantized_as_transformers_does(tmp_path):
    save_gpt_oss(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", dtype=torch.bfloat16)
    found, wanted = load_file(tmp_path / "b" / "model.safetensors"), gpt_oss_by_transformers(tmp_path / "a")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("to_format", ["llama", "megatron-torch-dist"])
def test_a_directory_that_transformers_wrote_survives_two_formats(tmp_path, to_format):
    save_fp8_by_transformers(tmp_path / "a", tmp_path / "plain")
    assert load_file(tmp_path / "a" / "model.safetensors")[Q_PROJ].dtype == torch.float8_e4m3fn
    convert(tmp_path / "a", tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c", to_format=to_format, dtype=torch.bfloat16)
    convert(tmp_path / "c", tmp_path / "d", options=ALLOW)
    found = load_file(tmp_path / "d" / "model.safetensors")
    wanted = dequantized_by_transformers(tmp_path / "a", "fp8", torch.bfloat16)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_mxfp4_survives_a_copy_and_a_conversion(tmp_path):
    save_gpt_oss(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c", dtype=torch.bfloat16)
    found, wanted = load_file(tmp_path / "c" / "model.safetensors"), gpt_oss_by_transformers(tmp_path / "a")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ["q_proj.input_scale", "q_proj.activation_scale", "attn.k_scale"])
def test_scales_of_activations_are_left_out_with_a_note(tmp_path, name):
    save_quantized(tmp_path / "a", "float8 by tensor")
    file = tmp_path / "a" / "model.safetensors"
    save_file(load_file(file) | {f"model.layers.0.self_attn.{name}": torch.ones(1)}, file)
    done = convert(tmp_path / "a", tmp_path / "b", dtype=torch.bfloat16)
    assert any("left out 1 activation scales" in note for note in done.notes)
    assert not any("scale" in stored for stored in load_file(tmp_path / "b" / "model.safetensors"))


def test_they_are_copied_whole_without_a_dtype(tmp_path):
    save_quantized(tmp_path / "a", "fp8 in blocks")
    convert(tmp_path / "a", tmp_path / "b")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in found)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"] == KINDS["fp8 in blocks"]


@pytest.mark.parametrize("case", ["gptq", "awq", "packed", "two codes to a byte"])
def test_codes_without_a_rule_are_copied_too_but_not_without_the_other_weights(tmp_path, case):
    save_other(tmp_path / "a", case)
    file = tmp_path / "a" / "model.safetensors"
    assert not any("not part of" in note for note in convert(tmp_path / "a", tmp_path / "b").notes)
    wanted = load_file(file)
    assert set(load_file(tmp_path / "b" / "model.safetensors")) == set(wanted)
    del wanted["model.layers.0.self_attn.k_proj.weight"]
    save_file(wanted, file, metadata={"format": "pt"})
    with pytest.raises(ps.CheckpointError, match=r"1 of the model's .* are missing: model.layers.0.self_attn.k_proj"):
        convert(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("to_format", ["huggingface", "llama", "megatron-torch-dist"])
def test_other_codes_are_refused_by_name(tmp_path, case, to_format):
    save_other(tmp_path / "a", case)
    with pytest.raises(ps.CheckpointError, match=r"q_proj|quant_method='"):
        convert(tmp_path / "a", tmp_path / "b", to_format=to_format, dtype=torch.bfloat16)
    assert not (tmp_path / "b").exists()
