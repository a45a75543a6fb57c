"""A config.json is read as transformers reads it, with every optional field left out in turn."""

import itertools

import pytest
import torch
import transformers
from safetensors import safe_open
from support.models.tiny import tiny_config, tiny_model
from support.oracles.conversions import SCALED
from support.oracles.expert_checkpoints import expert_config

import polyshard as ps
from polyshard.config.decoder_spec import DecoderSpec, expected_shapes, foreign_fields
from polyshard.convert.accounting import rotary_frequencies

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
OPTIONAL = (
    *("head_dim", "num_key_value_heads", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "rope_parameters"),
    *("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    "max_position_embeddings",
)
CHANGES = (
    {},
    {"tie_word_embeddings": True, "num_key_value_heads": 4},
    {"attention_bias": True, "mlp_bias": True},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    {"rope_parameters": SCALED},
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", CHANGES)
def test_every_optional_field_left_out_is_what_transformers_fills_in(family, changes):
    full = tiny_config(family, **changes).to_dict()
    for name in (None, *OPTIONAL):
        fields = {key: value for key, value in full.items() if key != name}
        read = transformers.AutoConfig.for_model(**fields).to_dict()
        assert DecoderSpec.of(fields).differences(DecoderSpec.of(read)) == [], name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", CHANGES)
def test_the_expected_tensors_are_those_of_transformers(family, changes):
    model = tiny_model(tiny_config(family, **changes))
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del found["lm_head.weight"]
    assert expected_shapes(DecoderSpec.of(model.config.to_dict())) == found


EXPERT_CHANGES = (
    {},
    {"sliding_window": 7, "use_sliding_window": True, "num_key_value_heads": 4, "tie_word_embeddings": True},
    {"decoder_sparse_step": 2, "norm_topk_prob": True, "attention_bias": True},
    {"mlp_only_layers": [0]},
)
LIKE_DEEPSEEK = (
    {"attention_bias": True, "use_qk_norm": True, "n_shared_experts": 2},
    {"max_window_layers": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0},
)
EXPERT_OPTIONAL = ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
EXPERT_OPTIONAL += ("decoder_sparse_step", "mlp_only_layers", "num_experts", "shared_expert_intermediate_size")
EXPERT_OPTIONAL += ("qkv_bias", "first_k_dense_replace", "routed_scaling_factor", "n_group", "topk_group")
EXPERT_OPTIONAL += ("n_routed_experts", "n_shared_experts", "use_qk_norm")
LATENT_CHANGES = (
    {"n_group": 2, "topk_group": 1},
    {"q_lora_rank": None, "attention_bias": True, "rope_interleave": False, "n_group": 1, "topk_group": 1},
)
EXPERT_OPTIONAL += ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")
EXPERT_OPTIONAL += ("rope_interleave",)
NEEDED = {"dots1": ("num_experts_per_tok", "n_routed_experts", "n_shared_experts")}  # they have no default


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *itertools.product(("mixtral", "qwen2_moe", "qwen3_moe"), EXPERT_CHANGES),
        *itertools.product(("dots1", "glm4_moe"), LIKE_DEEPSEEK),
        *itertools.product(("deepseek_v3",), LATENT_CHANGES),
    ],
)
def test_experts_are_read_as_transformers_reads_them(family, changes, tmp_path):
    full = expert_config(family, **changes)
    for name in {None, *OPTIONAL, *EXPERT_OPTIONAL} - set(NEEDED.get(family, ())):
        fields = {key: value for key, value in full.items() if key != name}
        read = transformers.AutoConfig.for_model(**fields).to_dict()
        ours, theirs = (DecoderSpec.of(config, experts=True) for config in (fields, read))
        assert ours.differences(theirs) == [], name
    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**full)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a mapping
    assert expected_shapes(DecoderSpec.of(full, experts=True)) == found
    with pytest.raises(ps.CheckpointError, match="model_type is unsupported"):
        DecoderSpec.of(full)


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 700.0}, SCALED, CHANGES[3]["rope_parameters"]])
def test_rotary_frequencies_are_those_of_transformers(rope):
    model = tiny_model(tiny_config("llama", rope_parameters=rope))
    found = rotary_frequencies(DecoderSpec.of(model.config.to_dict()))
    assert torch.allclose(found, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


MISTRAL = {"model_type": "mistral"}
REFUSED = {
    "another family": ({"model_type": "gemma"}, "model_type is unsupported: got 'gemma', expected one of llama"),
    "no family": ({"model_type": None}, "model_type is unsupported: got None"),
    "no size": ({"hidden_size": None}, "hidden_size is wrong: got None, expected a positive integer"),
    "a fraction": ({"num_hidden_layers": 2.5}, "num_hidden_layers is wrong: got 2.5"),
    "layer types": ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types are wrong: got 1"),
    "a window of a fraction": (
        MISTRAL | {"sliding_window": 2.5},
        "sliding_window is wrong: got 2.5, expected a positive",
    ),
    "a window that is true": (MISTRAL | {"sliding_window": True}, "sliding_window is wrong: got True"),
    "text": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is wrong: got '1e-5', expected a number"),
    "KV heads": ({"num_key_value_heads": 3}, "num_key_value_heads is wrong: got 3, expected a divisor of 4"),
    "a scaling's name": ({"rope_scaling": "linear"}, "rope_scaling is wrong: got 'linear', expected an object"),
    "half a scaling": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        "low_freq_factor, high_freq_factor is",
    ),
    "no field": ({"self": 1}, "got a key 'self', which is not a field"),
    "nested rope": ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters are unsupported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_decoder_is_refused_by_its_field(case):
    changes, message = REFUSED[case]
    with pytest.raises(ps.CheckpointError, match=message):
        expected_shapes(DecoderSpec.of(tiny_config("llama").to_dict() | changes))


def test_a_missing_field_is_named():
    fields = tiny_config("llama").to_dict()
    del fields["vocab_size"]
    with pytest.raises(ps.CheckpointError, match="incomplete: vocab_size is missing"):
        DecoderSpec.of(fields)


def test_fields_of_other_families_count_only_with_values_that_change_something():
    assert foreign_fields({"logits_scaling": 1.0, "residual_multiplier": None}) == []
    assert foreign_fields({"logits_scaling": 8.0, "num_experts": 4}) == ["logits_scaling=8.0", "num_experts=4"]
