"""Small quantized directories as they are published, and transformers' own dequantized models of them."""

import json
from unittest import mock

import torch
import transformers
from safetensors.torch import save_file
from transformers.quantizers import quantizer_finegrained_fp8

from support.models.tiny import tiny_config, tiny_model

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
    if strategy == "block":
        weights["block_structure"] = [128, 128]
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
    "float8 in blocks": _scheme("float", "block"),
}


def save_quantized(directory, kind, **changes):
    """A Llama as the format's files are published; the rules are those of docs/how-to/convert.md."""
    if kind == "float8 in blocks":  # compressed-tensors takes the scales of one column of blocks for those of rows
        changes = {"hidden_size": 256} | changes
    model = tiny_model(tiny_config("llama", **SHAPE | changes))
    state = dict(model.state_dict())
    for name, value in model.state_dict().items():
        if "_proj" not in name:
            continue
        if kind.endswith("in blocks"):
            state[name], scale = _blocks(value)
            state[f"{name}_scale" if kind.startswith("float8") else f"{name}_scale_inv"] = scale
            continue
        top = 127 if kind.startswith("int8") else 448
        scale = (value.abs().amax(1, keepdim=True) if "channel" in kind else value.abs().amax().reshape(1)) / top
        codes = value / scale
        integer = codes.round().clamp(-128, 127).to(torch.int8)
        state[name] = integer if kind.startswith("int8") else codes.to(torch.float8_e4m3fn)
        state[f"{name}_scale"] = scale
    write(directory, state, model, KINDS[kind])
    return model


def write(directory, state, model, settings):
    directory.mkdir()
    save_file({name: v.contiguous() for name, v in state.items()}, directory / "model.safetensors", {"format": "pt"})
    fields = model.config.to_dict() | {"architectures": [type(model).__name__], "quantization_config": settings}
    (directory / "config.json").write_text(json.dumps(fields, default=str))


def dequantized_by_transformers(directory, kind, dtype):
    settings = (
        transformers.FineGrainedFP8Config(dequantize=True)
        if kind.startswith("fp8")
        else transformers.CompressedTensorsConfig(run_compressed=False)
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=settings)
    return loaded.state_dict()


def save_fp8_by_transformers(directory, plain, **settings):
    """As transformers quantizes and writes a model; it asks for a GPU, which its rounding does not need.

    Every matrix divides into blocks: beside one that does not, transformers 5.24 writes a scale that it never set.
    """
    tiny_model(tiny_config("llama", **SHAPE | {"num_key_value_heads": 4})).save_pretrained(plain)
    with mock.patch.object(quantizer_finegrained_fp8.FineGrainedFP8HfQuantizer, "validate_environment"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.bfloat16, quantization_config=transformers.FineGrainedFP8Config(**settings)
        )
    model.save_pretrained(directory)


def save_gpt_oss(directory):
    """A gpt-oss of two layers with its experts in MXFP4."""
    config = transformers.GptOssConfig(
        **{**SHAPE, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
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
    write(directory, state, model, {"quant_method": "mxfp4", "modules_to_not_convert": ignored})


def gpt_oss_by_transformers(directory):
    settings = transformers.Mxfp4Config(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=settings
    ).state_dict()


OTHERS = {
    "gptq": (
        {"qweight": torch.ones(20, 8, dtype=torch.int32), "scales": torch.ones(2, 8), "bias": torch.zeros(128)},
        {"quant_method": "gptq"},
    ),
    "awq": (
        {"qweight": torch.ones(20, 8, dtype=torch.int32), "qzeros": torch.ones(2, 1).int()},
        {"quant_method": "awq"},
    ),
    "bitsandbytes": ({"weight.absmax": torch.ones(9)}, {"quant_method": "bitsandbytes"}),
    "packed": ({"weight_packed": torch.ones(8, 8).int(), "weight_scale": torch.ones(8, 1)}, _scheme("int", "channel")),
    "zero points": (
        {
            **{"weight": torch.ones(128, 128).to(torch.int8), "weight_scale": torch.ones(128, 1)},
            "weight_zero_point": torch.ones(128, 1).to(torch.int8),
        },
        _scheme("int", "channel"),
    ),
    "a scale beside a float weight": ({"weight": torch.ones(128, 128), "weight_scale_inv": torch.ones(1, 1)}, FP8),
    "exponents for scales": (
        {
            **{"weight": torch.ones(128, 128).to(torch.float8_e4m3fn)},
            "weight_scale_inv": torch.full((128, 4), 127).to(torch.uint8),
        },
        FP8 | {"weight_block_size": [1, 32]},
    ),
    "two codes to a byte": (
        {"weight": torch.ones(128, 64).to(torch.int8), "weight_scale_inv": torch.ones(1, 1)},
        FP8 | {"expert_dtype": "fp4"},
    ),
    "silent": ({"weight": torch.ones(128, 128).to(torch.float8_e4m3fn)}, None),
    "other blocks": (
        {"weight": torch.ones(128, 128).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(3, 3)},
        FP8,
    ),
}


def save_other(directory, case):
    """A Llama of which one layer holds codes that have no rule here."""
    tensors, settings = OTHERS[case]
    model = tiny_model(tiny_config("llama", **SHAPE))
    state = dict(model.state_dict())
    place = "model.layers.0.self_attn.q_proj"
    del state[f"{place}.weight"]
    state |= {f"{place}.{name}": value for name, value in tensors.items()}
    write(directory, state, model, settings)


def save_four_bits(directory, values, method):
    """Save a Llama with four-bit weights in groups of 32 as `method` stores them, and the dequantized values."""
    model = tiny_model(tiny_config("llama", **SHAPE))
    state = dict(model.state_dict())
    stands_for = dict(state)
    for name, value in model.state_dict().items():
        if "_proj" in name:
            groups = value.unflatten(1, (-1, 32))
            scales = (groups.abs().amax(2, keepdim=True) / 7).half().float()
            codes = (groups / scales).round().clamp(-8, 7)
            stands_for[name] = (codes * scales).flatten(1)
            del state[name]
            stored = _stored((codes + 8).long().flatten(1), scales.squeeze(2), method)
            state |= {f"{name.removesuffix('.weight')}.{kind}": tensor for kind, tensor in stored.items()}
    settings = {"quant_method": method, "bits": 4, "group_size": 32}
    if method == "compressed-tensors":
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights | {"dynamic": False}}}
        settings = {"format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"]}
        settings |= {"quant_method": method, "config_groups": groups}
    settings |= {"gptq": {"desc_act": False, "sym": True}, "awq": {"zero_point": True, "version": "gemm"}}.get(
        method, {}
    )
    write(directory, state, model, settings)
    write(values, stands_for, model, None)


def _stored(codes, scales, method):
    """A layer's tensors from codes 0 to 15 `[out, in]` and scales `[out, in / 32]`."""
    outputs, inputs = codes.shape
    if method == "compressed-tensors":
        shape = torch.tensor([outputs, inputs])
        return {"weight_packed": _pack(codes.unflatten(1, (-1, 8))), "weight_scale": scales, "weight_shape": shape}
    zero = 0x77777777 if method == "gptq" else 0x88888888 - (1 << 32)  # GPTQ stores them less one
    zeros = torch.full((inputs // 32, outputs // 8), zero, dtype=torch.int32)
    stored = {"qzeros": zeros, "scales": scales.t().half()}
    if method == "gptq":
        order, bias = (torch.arange(inputs) // 32).int(), torch.zeros(outputs).half()  # AutoGPTQ writes one everywhere
        return stored | {"qweight": _pack(codes.unflatten(1, (-1, 8))).t(), "g_idx": order, "bias": bias}
    return stored | {"qweight": _pack(codes.t().unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]])}


def _pack(codes):
    """Eight codes of four bits to an int32, the first in the lowest bits."""
    words = sum(codes[..., i] << (4 * i) for i in range(8))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
