"""Models with the same weights that compute with other settings are told apart, at every size of every axis."""

import decoder
import moe
import pytest
import torch
import transformers
from support.models.experts import save_moe
from support.models.tiny import save_tiny
from torch import nn

import polyshard as ps
from polyshard.core.computation import check_same_computation, computation_of, merged
from polyshard.launch.ranks import run_ranks


def described(build, config, **sizes):
    context = ps.initialize("torch", **sizes)
    model = build(config, context)
    found = computation_of(model, ps.collect_layouts(model))
    ps.shutdown(context)
    return found


def described_on_a_rank(directory, sizes):
    return described(moe.build_model, ps.read_config(directory), **sizes)


def changed(directory, **fields):
    return ps.ModelConfig(**{**ps.read_config(directory).to_dict(), **fields})


FIRST = r"model\.layers\.0\."
DENSE = {
    "norms": ({"rms_norm_eps": 1e-6}, rf"eps of the layer of '{FIRST}input_layernorm.weight' is 1e-05 in .* and 1e-06"),
    "theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        r"rotary_frequencies of the layer of 'RotaryEmbedding 0' is \[1, .*\] in",
    ),
    "scaling": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        r"rotary_frequencies .* \[0\.5, ",
    ),
    "heads": (
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
        rf"num_heads of the layer of '{FIRST}self_attn.q_proj.weight' is 4 in a and 2 in b",
    ),
}
EXPERTS = {
    "per token": ({"num_experts_per_tok": 3}, rf"experts_per_token of the layer of '{FIRST}mlp.gate.weight' is 2 in"),
    "normalized": ({"norm_topk_prob": False}, "router_normalize .* is True in a and False in b"),
}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [(kind, *case) for kind, cases in (("dense", DENSE), ("experts", EXPERTS)) for case in cases.values()],
    ids=[*DENSE, *EXPERTS],
)
def test_what_differs_is_named_with_its_layer(tmp_path, kind, changes, message):
    save, build = (save_tiny, decoder.build_model) if kind == "dense" else (save_moe, moe.build_model)
    directory = save(tmp_path, "qwen3" if kind == "dense" else "qwen3_moe")
    first, second = (described(build, changed(directory, **fields)) for fields in ({}, changes))
    check_same_computation(first, first, ("a", "b"))
    with pytest.raises(ps.ConfigurationError, match=message):
        check_same_computation(first, second, ("a", "b"))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_the_description_does_not_depend_on_sizes(tmp_path, kind):
    directory = save_moe(tmp_path, kind)
    whole = described_on_a_rank(directory, {})
    assert len(whole) > 4
    for sizes in ({"tensor": 2}, {"pipeline": 2}, {"expert": 2}):
        assert merged(run_ranks(described_on_a_rank, 2, directory, sizes)) == whole


def test_models_of_transformers_are_described(tmp_path):
    config = transformers.AutoConfig.from_pretrained(save_tiny(tmp_path, "llama"))
    first = described(ps.transformers_model, config)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 5e5}
    second = described(ps.transformers_model, config)
    with pytest.raises(ps.ConfigurationError, match="rotary_frequencies of the layer of 'LlamaRotaryEmbedding 0'"):
        check_same_computation(first, second, ("a", "b"))


def test_routers_that_compute_the_same_are_described_alike(tmp_path):
    directory = save_moe(tmp_path, "gpt_oss")
    ours = described(moe.build_model, ps.read_config(directory))
    theirs = described(ps.transformers_model, transformers.AutoConfig.from_pretrained(directory))
    gate = "model.layers.0.mlp.router.weight"
    assert {gate} <= set(ours) & set(theirs)
    check_same_computation(ours, theirs, ("moe.py", "transformers"))
    torch.manual_seed(0)
    logits = torch.randn(7, 8)
    for router, same in (
        (ps.Router(normalize=True), ps.Router(score="softmax_of_chosen")),
        (ps.Router(epsilon=1.0, least_sum=2.0), ps.Router()),
        (ps.Router(groups=2, chosen_groups=2, best_of_group=1), ps.Router()),
        (ps.Router(score="sigmoid", normalize=True), ps.Router(score="sigmoid", normalize=True, epsilon=1e-20)),
    ):
        assert router.simplest() == same.simplest() != ps.Router(scale=2.0).simplest()
        first, second = router.route(logits, 3), same.route(logits, 3)
        assert torch.equal(first.experts, second.experts)
        torch.testing.assert_close(first.weights, second.weights)


def test_attention_that_an_engine_has_wrapped_for_lora_is_described(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

    context = ps.initialize("torch")
    model = decoder.build_model(ps.read_config(save_tiny(tmp_path, "qwen3")), context)
    table = ps.collect_layouts(model)
    expected = computation_of(model, table)
    for module in list(model.modules()):
        for name in ("qkv", "o_proj", "gate_up"):
            if hasattr(module, name):
                setattr(module, name, Wrapped(getattr(module, name)))
    assert computation_of(model, table) == expected


def test_rotary_embeddings_of_each_type_of_layer_are_described():
    types = ["sliding_attention", "full_attention"]
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 96}
    config = transformers.Gemma3TextConfig(**sizes, intermediate_size=64, num_hidden_layers=2, layer_types=types)
    first = described(ps.transformers_model, config)
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    config.rope_parameters = {**config.rope_parameters, "full_attention": full}
    second = described(ps.transformers_model, config)
    message = "full_attention_rotary_frequencies of the layer of 'Gemma3RotaryEmbedding 0' is"
    with pytest.raises(ps.ConfigurationError, match=message):
        check_same_computation(first, second, ("a", "b"))


def test_a_layer_without_a_rotary_embedding_is_told_from_one_with_it():
    layers = [ps.TrainableFlashAttention(64, 4, rotary=rotary) for rotary in (None, ps.RotaryEmbedding(16))]
    first, second = (computation_of(layer, ps.collect_layouts(layer)) for layer in layers)
    with pytest.raises(
        ps.ConfigurationError, match=r"has_rotary of the layer of 'q_proj.weight' is False in a and True"
    ):
        check_same_computation(first, second, ("a", "b"))


def test_settings_of_layers_that_one_model_lacks_are_not_compared():
    check_same_computation({"a": {"eps": 1.0}}, {"b": {"eps": 2.0}}, ("one", "two"))
    check_same_computation({"a": {"eps": 1.0}}, {"a": {"scale": 2.0}}, ("one", "two"))
    assert merged([{"a": {"eps": 1.0, "scale": 1.0}}, {"a": {"eps": 2.0}}]) == {"a": {"scale": 1.0}}
