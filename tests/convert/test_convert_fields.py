"""Every field of a configuration that changes the function is carried through a format, or refused by its name.

Sources: ggml-org/llama.cpp#8676 and JIA-Lab-research/LongLoRA#181 (rotary scaling lost in conversion).
"""

import argparse
import json
import math

import pytest
import torch
from support.models.tiny import save_tiny, tiny_config, tiny_model
from support.oracles.conversions import ALLOW, SCALED, logits, meta_params, save_gguf, with_config

import polyshard as ps
from polyshard.convert import convert

SHAPE = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 512},
}
LLAMA31 = SCALED | {"original_max_position_embeddings": 8192}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 900.0, "original_max_position_embeddings": 128}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 900.0}

# What a model is, and whether Meta's format and Megatron's hold it.
MODELS = {
    "rotary base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}}, True, True),
    "a fractional base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}}, True, True),
    "scaling of Llama 3.1": ("llama", {"rope_parameters": LLAMA31}, True, True),
    "scaling of Llama 3.2": ("llama", {"rope_parameters": LLAMA31 | {"factor": 32.0}}, True, True),
    "scaling with other constants": ("llama", {"rope_parameters": SCALED}, True, False),
    "linear scaling": ("llama", {"rope_parameters": LINEAR}, False, True),
    "linear scaling by a fraction": ("llama", {"rope_parameters": LINEAR | {"factor": 1.5}}, False, False),
    "yarn": ("llama", {"rope_parameters": YARN}, False, False),
    "dynamic scaling": ("llama", {"rope_parameters": DYNAMIC}, False, False),
    "norm epsilon": ("llama", {"rms_norm_eps": 3e-3}, True, True),
    "activation": ("llama", {"hidden_act": "gelu"}, False, False),
    "head size": ("llama", {"head_dim": 32}, True, True),
    "tied": ("llama", {"tie_word_embeddings": True}, True, True),
    "as many KV heads": ("llama", {"num_key_value_heads": 4}, True, True),
    "window": ("mistral", {"sliding_window": 9}, True, True),
    "no window": ("mistral", {"sliding_window": None}, True, True),
    "windows on some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        False,
        True,
    ),
    "qwen3": ("qwen3", {"head_dim": 16}, False, True),
    "qwen3 with other heads": ("qwen3", {"head_dim": 32}, False, True),
    "qwen3 with biases": ("qwen3", {"head_dim": 16, "attention_bias": True}, False, False),
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("to_format", ["llama", "megatron-torch-dist"])
def test_a_model_survives_a_format_or_is_refused(tmp_path, case, to_format):
    family, changes, by_llama, by_megatron = MODELS[case]
    save_tiny(tmp_path / "a", family, **{**SHAPE, **changes})
    if not (by_llama if to_format == "llama" else by_megatron):
        with pytest.raises(ps.CheckpointError, match=r"has no place for|cannot express this model"):
            convert(tmp_path / "a", tmp_path / "b", to_format=to_format)
        assert not (tmp_path / "b").exists()
        return
    convert(tmp_path / "a", tmp_path / "b", to_format=to_format)
    convert(tmp_path / "b", tmp_path / "c", options=ALLOW)
    assert torch.equal(logits(tmp_path / "c"), logits(tmp_path / "a"))


@pytest.mark.parametrize("case", [name for name, entry in MODELS.items() if entry[2]])
def test_params_alone_are_enough_for_metas_format(tmp_path, case):
    """Meta's own files, without a config.json of ours beside them."""
    family, changes, *_ = MODELS[case]
    save_tiny(tmp_path / "a", family, **{**SHAPE, **changes})
    convert(tmp_path / "a", tmp_path / "b", to_format="llama")
    (tmp_path / "b" / "config.json").unlink()
    convert(tmp_path / "b", tmp_path / "c", options=ALLOW)
    assert torch.equal(logits(tmp_path / "c"), logits(tmp_path / "a"))


@pytest.fixture
def llama(tmp_path):
    """Meta's files of a model without scaling."""
    save_tiny(tmp_path / "a", "llama", **SHAPE)
    convert(tmp_path / "a", tmp_path / "llama", to_format="llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("beside", [True, False])
def test_metas_use_scaled_rope_is_llama3_scaling(tmp_path, llama, beside):
    """As Meta ships Llama 3.1; a stale config.json beside it does not win."""
    if not beside:
        (llama / "config.json").unlink()
    meta_params(llama, use_scaled_rope=True, ffn_dim_multiplier=1.3, multiple_of=32, max_seq_len=None)
    done = convert(llama, tmp_path / "back", options=ALLOW, verify=True)
    rope = json.loads((tmp_path / "back" / "config.json").read_text())["rope_scaling"]
    assert rope == {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 8192,
    }
    assert any("params.json is used" in n if beside else "Llama 3.2 have factor 32" in n for n in done.notes)


def test_the_constants_of_llama_32_come_from_the_users_configuration(tmp_path, llama):
    (llama / "config.json").unlink()
    meta_params(llama, use_scaled_rope=True, rope_theta=5000.0)
    right = tiny_config("llama", **SHAPE, rope_parameters=LLAMA31 | {"factor": 32.0})
    convert(llama, tmp_path / "back", options=with_config(right), verify=True)
    rope = json.loads((tmp_path / "back" / "config.json").read_text())["rope_parameters"]
    assert rope["factor"] == 32.0
    with pytest.raises(ps.CheckpointError, match=r"--config describes another model than .*params.json: got rope"):
        convert(llama, tmp_path / "no", options=with_config(tiny_config("llama", **SHAPE)))


@pytest.mark.parametrize(
    "field",
    [
        {"quantization_args": {"group_size": 32}},
        {"lora_args": {"rank": 16}},
        {"moe": {"num_experts": 8}},
        {"qk_norm": True},
    ],
)
def test_an_unknown_field_of_params_is_refused(tmp_path, llama, field):
    meta_params(llama, **field)
    with pytest.raises(ps.CheckpointError, match=f"params.json has unsupported fields: got {next(iter(field))}="):
        convert(llama, tmp_path / "back", options=ALLOW)


FOREIGN = {"residual_multiplier": 0.22, "logits_scaling": 8.0, "final_logit_softcapping": 30.0, "num_experts": 8}


@pytest.mark.parametrize("field", FOREIGN)
@pytest.mark.parametrize("to_format", ["llama", "megatron-torch-dist"])
def test_a_field_of_another_family_is_refused(tmp_path, field, to_format):
    save_tiny(tmp_path / "a", "llama", **SHAPE)
    file = tmp_path / "a" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: FOREIGN[field]}))
    with pytest.raises(ps.CheckpointError, match=f"{field}={FOREIGN[field]}"):
        convert(tmp_path / "a", tmp_path / "b", to_format=to_format)


# Arguments of a Megatron checkpoint that contradict the configuration of the test's model.
ARGUMENTS = {
    "rotary_base": 500000,
    "rotary_percent": 0.5,
    "use_rope_scaling": True,
    "rotary_seq_len_interpolation_factor": 4,
    "norm_epsilon": 1e-6,
    "normalization": "LayerNorm",
    "swiglu": False,
    "squared_relu": True,
    "window_size": (127, 0),
    "untie_embeddings_and_output_weights": False,
    "qk_layernorm": True,
    "kv_channels": 32,
    "num_attention_heads": 8,
    "position_embedding_type": "learned_absolute",
    "apply_layernorm_1p": True,
    "rotary_interleaved": True,
    "num_experts": 4,
    "multi_latent_attention": True,
    "no_rope_freq": 4,
    "softmax_scale": 0.5,
    "mtp_num_layers": 1,
    "num_layers": 3,
    "vocab_size": 120,
}


SAID = {
    "use_rope_scaling": "rotary scaling llama3",
    "rotary_seq_len_interpolation_factor": "rotary scaling linear",
    "window_size": "windows .128, 128.",
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_megatrons_arguments_that_contradict_the_configuration_are_refused(tmp_path, name):
    save_tiny(tmp_path / "a", "llama", **SHAPE)
    convert(tmp_path / "a", tmp_path / "meg", to_format="megatron-torch-dist")
    file = tmp_path / "meg" / "iter_0000000" / "common.pt"
    content = torch.load(file, weights_only=False)
    setattr(content["args"], name, ARGUMENTS[name])
    torch.save(content, file)
    with pytest.raises(ps.CheckpointError, match=SAID.get(name, name)):
        convert(tmp_path / "meg", tmp_path / "b", options=ALLOW)


def test_without_arguments_a_note_says_what_was_not_checked(tmp_path):
    save_tiny(tmp_path / "a", "llama", **SHAPE)
    convert(tmp_path / "a", tmp_path / "meg", to_format="megatron-torch-dist")
    torch.save({"iteration": 0}, tmp_path / "meg" / "iter_0000000" / "common.pt")
    done = convert(tmp_path / "meg", tmp_path / "b", options=ALLOW)
    assert any("holds no arguments of Megatron" in note for note in done.notes)


def test_megatrons_arguments_are_what_its_own_training_reads(tmp_path):
    """Names as load_args_from_checkpoint in megatron/training/checkpointing.py asks for them."""
    save_tiny(tmp_path / "a", "qwen2", **SHAPE, use_sliding_window=True, sliding_window=9, max_window_layers=1)
    convert(tmp_path / "a", tmp_path / "meg", to_format="megatron-torch-dist")
    found = torch.load(tmp_path / "meg" / "iter_0000000" / "common.pt", weights_only=False)["args"]
    assert isinstance(found, argparse.Namespace)
    assert (found.rotary_base, found.add_qkv_bias, found.add_bias_linear, found.swiglu) == (10000, True, False, True)
    assert (found.window_size, found.window_attn_skip_freq) == ((8, 0), [0, 1])
    assert (found.num_query_groups, found.kv_channels, found.padded_vocab_size) == (2, 16, 128)


def _factors(scaling):
    """As llama.cpp's convert_hf_to_gguf.py computes rope_freqs.weight."""
    base, size, old = scaling["rope_theta"], 16, scaling["original_max_position_embeddings"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * base ** (i / size)
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(factor)
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors)


GGUF = {
    "scaling of Llama 3.1": ("llama", {"rope_parameters": SCALED}, {}, {"rope_freqs.weight": _factors(SCALED)}),
    "linear scaling": (
        *("llama", {"rope_parameters": LINEAR}),
        *({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, {}),
    ),
    "head size": ("llama", {"head_dim": 32}, {"llama.rope.dimension_count": 32}, {}),
    "qwen3's head size": ("qwen3", {"head_dim": 32}, {}, {}),
    "qwen2": ("qwen2", {}, {}, {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}, {}, {}),
}


@pytest.mark.parametrize("case", GGUF)
def test_ggufs_metadata_is_carried(tmp_path, case):
    family, changes, metadata, extra = GGUF[case]
    model = tiny_model(tiny_config(family, **{**SHAPE, **changes}))
    model.save_pretrained(tmp_path / "hf")
    file = save_gguf(tmp_path / "m.gguf", model, family, metadata, extra)
    convert(file, tmp_path / "out")
    difference = (logits(tmp_path / "out") - logits(tmp_path / "hf")).abs().max()
    assert difference < 1e-4  # GGUF holds the norm's epsilon in float32


UNREAD = {
    "llama.attention.sliding_window": 64,
    "llama.rope.dimension_count": 8,
    "llama.rope.scaling.type": "longrope",
    "llama.logit_scale": 0.5,
    "llama.expert_count": 4,
    "llama.attention.value_length_mla": 8,
    "llama.attention.causal": False,
    "llama.some_new_key": 1,
    "split.count": 2,
    "general.type": "adapter",
}


@pytest.mark.parametrize("key", UNREAD)
def test_ggufs_metadata_that_cannot_be_carried_is_refused(tmp_path, key):
    model = tiny_model(tiny_config("llama", **SHAPE))
    file = save_gguf(tmp_path / "m.gguf", model, "llama", {key: UNREAD[key]})
    with pytest.raises(
        ps.CheckpointError, match="one part of several" if key == "split.count" else key.replace(".", r"\.")
    ):
        convert(file, tmp_path / "out")


def test_ggufs_factors_of_another_scaling_are_refused(tmp_path):
    model = tiny_model(tiny_config("llama", **SHAPE))
    extra = {"rope_freqs.weight": torch.linspace(1, 3, 8)}
    with pytest.raises(ps.CheckpointError, match="rope_freqs.weight is unsupported"):
        convert(save_gguf(tmp_path / "m.gguf", model, "llama", extra=extra), tmp_path / "out")


def test_a_configuration_that_contradicts_a_hugging_face_directory_is_refused(tmp_path):
    save_tiny(tmp_path / "a", "llama", **SHAPE)
    for changes in (
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": SCALED},
        {"model_type": "mistral", "sliding_window": 8},
    ):
        options = with_config(tiny_config("llama", **SHAPE).to_dict() | changes)
        with pytest.raises(ps.CheckpointError, match=r"--config describes another model than .*config.json: got"):
            convert(tmp_path / "a", tmp_path / "b", options=options)
    convert(tmp_path / "a", tmp_path / "b", options=with_config(tiny_config("llama", **SHAPE)))


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3])
def test_a_configuration_that_contradicts_a_gguf_file_is_refused(tmp_path, epsilon):
    file = save_gguf(tmp_path / "m.gguf", tiny_model(tiny_config("llama", **SHAPE)), "llama")
    options = with_config(tiny_config("llama", **SHAPE, rms_norm_eps=epsilon))
    if epsilon == 1e-5:
        convert(file, tmp_path / "b", options=options)
        return
    with pytest.raises(ps.CheckpointError, match="--config describes another model than .*m.gguf: got norm_eps"):
        convert(file, tmp_path / "b", options=options)


def test_an_architecture_that_transformers_reads_loses_nothing_in_silence(tmp_path):
    """gemma2's soft caps have no place in transformers' table of GGUF keys."""
    import transformers

    config = transformers.Gemma2Config(**SHAPE, num_hidden_layers=2, head_dim=16)
    model = tiny_model(config)
    config.save_pretrained(tmp_path / "config")
    plain = save_gguf(tmp_path / "plain.gguf", model, "gemma2")
    convert(plain, tmp_path / "out-plain")
    model.save_pretrained(tmp_path / "hf")
    assert (logits(tmp_path / "out-plain") - logits(tmp_path / "hf")).abs().max() < 1e-4
    metadata = {"gemma2.attn_logit_softcapping": 30.0}
    file = save_gguf(tmp_path / "m.gguf", model, "gemma2", metadata)
    with pytest.raises(ps.CheckpointError, match=r"does not read all of .*attn_logit_softcapping"):
        convert(file, tmp_path / "out")
