"""Attention exchanged in transformers' own models: the same weights, the same outputs, the same gradients."""

import dataclasses

import pytest
import torch
import transformers
from torch import nn

import polyshard as ps
from polyshard.transformers.replaced.attention import ReplacedAttention

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WINDOWED = {"sliding_window": 5}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen2, windowed": transformers.Qwen2Config(**SIZES, **WINDOWED, use_sliding_window=True, max_window_layers=1),
    "qwen3": transformers.Qwen3Config(**SIZES),
    "mistral": transformers.MistralConfig(**SIZES, **WINDOWED),
    "gemma": transformers.GemmaConfig(**SIZES),
    "gemma2": transformers.Gemma2Config(**SIZES, **WINDOWED, query_pre_attn_scalar=24, attn_logit_softcapping=2.0),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, **WINDOWED, query_pre_attn_scalar=24),
    "phi3": transformers.Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "gpt-oss": transformers.GptOssConfig(**SIZES, **WINDOWED, num_local_experts=2, num_experts_per_tok=1),
}
IDS = torch.randint(1, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def built(name):
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)  # far from uniform weights
    return model


def outcome(model, **inputs):
    """Logits and the gradient of every parameter but attention's, in order."""
    model.zero_grad()
    logits = model(IDS, use_cache=False, **inputs).logits
    keep = inputs.get("attention_mask", torch.ones_like(IDS)).bool()
    logits[keep].square().mean().backward()
    others = {n: p.grad for n, p in model.named_parameters() if "attn" not in n and p.grad is not None}
    return logits[keep].detach(), others


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_the_same_before_and_after(name):
    model = built(name)
    padded = torch.ones_like(IDS)
    padded[0, :7] = 0
    inputs = [{}, {"attention_mask": padded}]
    before = [outcome(model, **x) for x in inputs]
    names = {n for n, m in model.named_modules() if n.endswith("self_attn")}
    done = ps.replace_with_trainable_attention(model)
    assert set(done.replaced) == names
    assert not done.kept
    for x, (logits, gradients) in zip(inputs, before):
        new_logits, new_gradients = outcome(model, **x)
        torch.testing.assert_close(new_logits, logits, rtol=1e-4, atol=1e-4)
        assert set(new_gradients) == set(gradients)
        for parameter, gradient in gradients.items():
            bound = 1e-5 + 1e-4 * float(gradient.abs().max())
            torch.testing.assert_close(new_gradients[parameter], gradient, rtol=1e-3, atol=bound)


def test_names_in_a_checkpoint_stay_what_they_were():
    model = built("qwen3")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ps.replace_with_trainable_attention(model)
    table = ps.collect_layouts(model).by_checkpoint_name()
    assert set(table) == set(before)
    fused = model.get_submodule("model.layers.1.self_attn").qkv.weight
    wanted = [before[f"model.layers.1.self_attn.{n}_proj.weight"] for n in "qkv"]
    assert torch.equal(fused, torch.cat(wanted))


def test_generation_with_a_cache_and_several_sequences_in_a_row():
    model = built("gemma2")
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    expected = model.generate(IDS, **options)
    alone = [model(row, use_cache=False).logits for row in (IDS[:1, :8], IDS[:1, 8:])]
    ps.replace_with_trainable_attention(model)
    assert torch.equal(model.generate(IDS, **options), expected)
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    packed = model(IDS[:1], position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


def test_the_kernel_of_the_replaced_modules_is_a_flash_kernel_in_training_too():
    model = built("llama").train()
    ps.replace_with_trainable_attention(model, kernel="cpu_flash")
    assert all(m.kernel == "cpu_flash" for m in model.modules() if isinstance(m, ReplacedAttention))
    model(IDS, use_cache=False).logits.sum().backward()
    assert model.get_submodule("model.layers.0.self_attn").qkv.weight.grad is not None


def test_what_cannot_be_replaced_is_named_and_nothing_is_changed():
    model = built("llama")
    odd = model.model.layers[1].self_attn
    odd.gate = nn.Linear(4, 4)
    with pytest.raises(ps.ConfigurationError, match=r"1 of 2 .*layers.1.self_attn: LlamaAttention: it has .* gate"):
        ps.replace_with_trainable_attention(model)
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"
    done = ps.replace_with_trainable_attention(model, strict=False)
    assert done.replaced == ("model.layers.0.self_attn",)
    assert model.model.layers[1].self_attn is odd


def test_other_arithmetic_under_the_same_names_is_found_out():
    class Doubled(type(built("llama").model.layers[0].self_attn)):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    model = built("llama")
    model.model.layers[0].self_attn.__class__ = Doubled
    with pytest.raises(ps.ConfigurationError, match="outputs differ by up to"):
        ps.replace_with_trainable_attention(model)
    cohere = transformers.AutoModelForCausalLM.from_config(transformers.CohereConfig(**SIZES))
    with pytest.raises(ps.ConfigurationError, match="rotates neighbouring pairs"):
        ps.replace_with_trainable_attention(cohere)
    with pytest.raises(ps.ConfigurationError, match="has no attention module: expected one with q_proj"):
        ps.replace_with_trainable_attention(nn.Linear(2, 2))


def test_arguments_that_attention_does_not_know_are_refused_by_name():
    model = built("llama")
    ps.replace_with_trainable_attention(model)
    with pytest.raises(ps.ConfigurationError, match="output_attentions=True, but no flash kernel computes them"):
        model(IDS, output_attentions=True, use_cache=False)
    attention = model.model.layers[0].self_attn
    hidden = torch.zeros(1, 3, 64)
    assert attention(hidden, use_cache=True, cache_position=torch.arange(3), head_mask=None)[1] is None
    with pytest.raises(
        ps.ConfigurationError, match="is_causal of attention layer 0 is wrong: got False, expected True"
    ):
        attention(hidden, is_causal=False)
    with pytest.raises(ps.ConfigurationError, match="got alibi, head_mask. Omit them"):
        attention(hidden, head_mask=torch.ones(4), alibi=1)


def test_the_cache_is_found_under_either_name():
    model = built("llama")
    ps.replace_with_trainable_attention(model)
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    rotary = tuple(torch.ones(1, 6, 16) * value for value in (1.0, 0.0))
    whole = attention(hidden, rotary)[0]
    for name in ("past_key_values", "cache"):
        cache = transformers.DynamicCache()
        parts = [
            attention(part, tuple(t[:, : part.shape[1]] for t in rotary), **{name: cache})[0]
            for part in (hidden[:, :4], hidden[:, 4:5], hidden[:, 5:])
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(ps.ConfigurationError, match="two caches: got DynamicCache as past_key_values and"):
        attention(hidden, rotary, past_key_values=cache, cache=transformers.DynamicCache())


def test_a_family_whose_whole_model_would_differ_is_refused_and_stays_as_it_was(monkeypatch):
    from polyshard.transformers.replaced import surgery

    config = transformers.MistralConfig(**{**SIZES, "vocab_size": 97}, **WINDOWED)  # of no other test
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    honest = surgery.recognise

    def without_window(module):
        return dataclasses.replace(honest(module), sliding_window=None)

    monkeypatch.setattr(surgery, "_compare", lambda *_: None)  # as if the modules were alike
    monkeypatch.setattr(surgery, "recognise", without_window)
    with pytest.raises(ps.ConfigurationError, match="the output of MistralForCausalLM changes when its attention"):
        ps.replace_with_trainable_attention(model)
    assert type(model.model.layers[0].self_attn).__name__ == "MistralAttention"


def test_the_layers_of_exaone_4_without_a_window_are_not_rotated():
    config = transformers.Exaone4Config(**SIZES, **WINDOWED, layer_types=["sliding_attention", "full_attention"])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    expected = model(IDS, use_cache=False).logits
    ps.replace_with_trainable_attention(model)
    torch.testing.assert_close(model(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    first, second = (layer.self_attn for layer in model.model.layers)
    assert (first.spec.sliding_window, first.uses_rotary) == (5, True)
    assert (second.spec.sliding_window, second.uses_rotary) == (None, False)
