"""Quantized files as they are published: dequantized as transformers does, copied whole, or refused by name."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.conversions import ALLOW
from support.models import tiny_config, tiny_model

import polyshard as ps
from polyshard.convert import convert

SHAPE = {
    **{"vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64},
}
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _blocks(value, size=128):
    rows, columns = -(-value.shape[0] // size), -(-value.shape[1] // size)
    padded = torch.nn.functional.pad(value, (0, columns * size - value.shape[1], 0, rows * size - value.shape[0]))
    scale = padded.reshape(rows, size, columns, size).abs().amax((1, 3)) / 448
    grown = scale.repeat_interleave(size, 0)[: value.shape[0]].repeat_interleave(size, 1)[:, : value.shape[1]]
    return (value / grown).to(torch.float8_e4m3fn), scale


def _scheme(kind, strategy):
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights}
    if kind == "int":
        group["input_activations"] = weights | {"strategy": "token", "dynamic": True}
    form = "int-quantized" if kind == "int" else "float-quantized"
    return {
        **{"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"},
        **{"ignore": ["lm_head"], "config_groups": {"group_0": group}},
    }


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
KINDS = {
    "fp8 in blocks": FP8 | {"modules_to_not_convert": ["lm_head"]},
    "int8 by channel": _scheme("int", "channel"),
    "float8 by tensor": _scheme("float", "tensor"),
    "float8 by channel": _scheme("float", "channel"),
}


def save_quantized(directory, kind, **changes):
    """A Llama as the format's files are published; see the table in docs/weights.md."""
    model = tiny_model(tiny_config("llama", **SHAPE | changes))
    state = dict(model.state_dict())
    for name, value in model.state_dict().items():
        if "_proj" not in name:
            continue
        if kind == "fp8 in blocks":
            state[name], state[name.replace("weight", "weight_scale_inv")] = _blocks(value)
            continue
        top = 127 if kind.startswith("int8") else 448
        scale = (value.abs().amax(1, keepdim=True) if "channel" in kind else value.abs().amax().reshape(1)) / top
        codes = value / scale
        integer = codes.round().clamp(-128, 127).to(torch.int8)
        state[name] = integer if kind.startswith("int8") else codes.to(torch.float8_e4m3fn)
        state[f"{name}_scale"] = scale
    _write(directory, state, model, KINDS[kind])
    return model


def _write(directory, state, model, settings):
    directory.mkdir()
    save_file({name: v.contiguous() for name, v in state.items()}, directory / "model.safetensors", {"format": "pt"})
    fields = model.config.to_dict() | {"architectures": [type(model).__name__], "quantization_config": settings}
    (directory / "config.json").write_text(json.dumps(fields, default=str))


def _by_transformers(directory, kind, dtype):
    settings = (
        transformers.FineGrainedFP8Config(dequantize=True)
        if kind.startswith("fp8")
        else transformers.CompressedTensorsConfig(run_compressed=False)
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=settings)
    return loaded.state_dict()


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
        _by_transformers(tmp_path / "a", kind, torch.float32),
    )
    assert set(found) == {name for name in wanted if not name.endswith("scale")}
    assert all(torch.equal(found[name], wanted[name].to(dtype)) for name in found)
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert any("dequantized 14 tensors" in note for note in done.notes)


def test_blocks_at_the_edge_of_a_matrix_are_cut(tmp_path):
    """Like DeepSeek-V3's kv_a_proj of 576 rows; transformers stretches them, so the original is the oracle."""
    model = save_quantized(tmp_path / "a", "fp8 in blocks", intermediate_size=200, hidden_size=160)
    convert(tmp_path / "a", tmp_path / "b", dtype=torch.float32)
    found = load_file(tmp_path / "b" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert (found[name] - value).abs().max() <= 2.0**-4 * value.abs().max(), name  # e4m3fn has three bits


@pytest.mark.parametrize("to_format", ["llama", "megatron-torch-dist"])
def test_dequantized_weights_survive_a_chain(tmp_path, to_format):
    save_quantized(tmp_path / "a", "fp8 in blocks")
    convert(tmp_path / "a", tmp_path / "b", to_format=to_format, dtype=torch.bfloat16)
    convert(tmp_path / "b", tmp_path / "c", options=ALLOW)
    found = load_file(tmp_path / "c" / "model.safetensors")
    wanted = _by_transformers(tmp_path / "a", "fp8", torch.bfloat16)
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_mxfp4_is_dequantized_as_transformers_does(tmp_path):
    config = transformers.GptOssConfig(
        **{**SHAPE, "hidden_size": 64, "intermediate_size": 64},
        **{
            "num_hidden_layers": 2,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
        },
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    state = {name: value.bfloat16() for name, value in model.state_dict().items()}
    for name, value in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")) and value.dim() == 3:
            experts, k, out = value.shape
            x = value.transpose(1, 2).reshape(experts, out, k // 32, 32)
            exponent = (x.abs().amax(-1) / 6).clamp(min=2**-100).log2().ceil()
            codes = ((x / 2.0 ** exponent[..., None])[..., None] - FP4).abs().argmin(-1).to(torch.uint8)
            del state[name]
            state[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
            state[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
    ignored = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _write(tmp_path / "a", state, model, {"quant_method": "mxfp4", "modules_to_not_convert": ignored})
    convert(tmp_path / "a", tmp_path / "b", dtype=torch.bfloat16)
    found = load_file(tmp_path / "b" / "model.safetensors")
    settings = transformers.Mxfp4Config(dequantize=True)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", dtype=torch.bfloat16, quantization_config=settings
    ).state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_they_are_copied_whole_without_a_dtype(tmp_path):
    save_quantized(tmp_path / "a", "fp8 in blocks")
    convert(tmp_path / "a", tmp_path / "b")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in found)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"] == KINDS["fp8 in blocks"]


OTHERS = {
    "gptq": ({"qweight": torch.ones(20, 8, dtype=torch.int32), "scales": torch.ones(2, 8)}, {"quant_method": "gptq"}),
    "awq": (
        {"qweight": torch.ones(20, 8, dtype=torch.int32), "qzeros": torch.ones(2, 1).int()},
        {"quant_method": "awq"},
    ),
    "bitsandbytes": ({"weight.absmax": torch.ones(9)}, {"quant_method": "bitsandbytes"}),
    "packed": ({"weight_packed": torch.ones(8, 8).int(), "weight_scale": torch.ones(8, 1)}, _scheme("int", "channel")),
    "silent": ({"weight": torch.ones(128, 128).to(torch.float8_e4m3fn)}, None),
    "other blocks": (
        {"weight": torch.ones(128, 128).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(3, 3)},
        FP8,
    ),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("to_format", ["huggingface", "llama", "megatron-torch-dist"])
def test_other_codes_are_refused_by_name(tmp_path, case, to_format):
    tensors, settings = OTHERS[case]
    model = tiny_model(tiny_config("llama", **SHAPE))
    state = dict(model.state_dict())
    place = "model.layers.0.self_attn.q_proj"
    del state[f"{place}.weight"]
    state |= {f"{place}.{name}": value for name, value in tensors.items()}
    _write(tmp_path / "a", state, model, settings)
    with pytest.raises(ps.CheckpointError, match=r"q_proj|quant_method='"):
        convert(tmp_path / "a", tmp_path / "b", to_format=to_format, dtype=torch.bfloat16)
    assert not (tmp_path / "b").exists()
