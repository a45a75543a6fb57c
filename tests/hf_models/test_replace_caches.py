"""Replaced attention with every cache, mask and packing of transformers: equal to the model before, or refused."""

import copy
import functools
import importlib
import re
import sys

import pytest
import torch
import transformers
from support.paths import TOOLS
from torch import nn

import polyshard as ps
from polyshard.transformers.replaced.batch import attend_batch
from polyshard.transformers.replaced.masks import slot_mask

sys.path.insert(0, str(TOOLS))
table = importlib.import_module("cache_table")

IDS = table.token_ids()
POSITIONS = torch.cat((torch.arange(8), torch.arange(10)))[None]
model_pair = functools.cache(table.model_pair)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", table.FAMILIES)
def test_every_cell_is_equal_or_refused_and_the_page_in_the_docs_says_which(name):
    rows = table.family_rows(name)
    assert table.DIFFERS not in {cell for cells in rows.values() for cell in cells}
    text = table.PAGE.read_text()
    for row, cells in rows.items():
        if len(cells) > 1:
            assert f"| {name} | {row} | {' | '.join(cells)} |" in text, "run python tools/cache_table.py"
        else:
            (line,) = re.findall(rf"^\| {row} \| (.+) \|$", text, re.MULTILINE)
            assert line.split(" | ")[list(table.FAMILIES).index(name)] == cells[0], "run python tools/cache_table.py"


def test_what_the_table_must_not_refuse():
    text = table.PAGE.read_text()
    assert all(
        "refused" not in line for line in text.splitlines() if line.startswith(tuple(f"| {f}" for f in table.FAMILIES))
    )
    assert len(re.findall(r"^\| position IDs[^|]*\|(?: equal \|){5}$", text, re.MULTILINE)) == 3


WAYS = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "beam search": {"num_beams": 3},
    "beam search, static cache": {"num_beams": 3, "cache_implementation": "static"},
    "prefill in parts": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("mask", ["none", "left", "gaps"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2"])
def test_generation_gives_the_tokens_of_the_model_before(name, way, mask):
    attention_mask = table.masks()[mask]
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, **WAYS[way]}
    options["attention_mask"] = torch.ones_like(IDS) if attention_mask is None else attention_mask
    before, after = (model.generate(IDS, **options) for model in model_pair(name))
    assert torch.equal(after, before)


def test_generation_continues_a_prompt_that_is_padded_on_the_right():
    options = {"max_new_tokens": 7, "do_sample": False, "attention_mask": table.masks()["left and right"]}
    before, after = (model.generate(IDS, **options) for model in model_pair("Llama"))
    assert torch.equal(after, before)


def test_a_last_query_that_sees_nothing_is_told_of(monkeypatch, caplog):
    monkeypatch.setattr("polyshard.transformers.replaced.dense._told", set())
    model_pair("Mistral")[1](IDS, attention_mask=table.masks()["left and right"])
    assert "a row ends with more masked tokens than the sliding window holds" in caplog.text


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_assisted_generation_crops_the_cache(name):
    original, replaced = model_pair(name)
    assistants = [copy.deepcopy(model) for model in (original, replaced)]
    for assistant in assistants:
        assistant.lm_head.weight.mul_(-1)  # proposes other tokens, which are taken back
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    expected = original.generate(IDS[:1], **options)
    for assistant in assistants:
        assert torch.equal(replaced.generate(IDS[:1], assistant_model=assistant, **options), expected)


def test_a_packed_row_is_not_continued_and_its_cache_can_be_used_again():
    replaced = model_pair("Llama")[1]
    cache = transformers.StaticCache(config=replaced.config, max_cache_len=40)
    replaced(IDS[:1], position_ids=POSITIONS, past_key_values=cache)
    with pytest.raises(ps.ConfigurationError, match="StaticCache cannot continue a packed row: got 18 cached tokens"):
        replaced(IDS[:1, :1], past_key_values=cache)
    cache.reset()
    replaced(IDS[:1, :4], past_key_values=cache)
    assert replaced(IDS[:1, 4:5], past_key_values=cache).logits.shape[1] == 1


def test_a_cache_that_does_not_say_which_slots_are_filled_is_refused_by_name():
    class OwnCache(transformers.DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return keys[:, :, 1:], values[:, :, 1:]

    replaced = model_pair("Llama")[1]
    with pytest.raises(ps.ConfigurationError, match="OwnCache returned unexpected keys .* got 17 slots, expected 18"):
        replaced(IDS, past_key_values=OwnCache())
    hidden = torch.zeros(1, 3, 64)
    with pytest.raises(ps.ConfigurationError, match="object is not supported as a cache of replaced attention"):
        replaced.model.layers[0].self_attn(hidden, past_key_values=object())


def test_positions_masks_and_boundaries_that_contradict_each_other_are_refused():
    replaced = model_pair("Mistral")[1]
    mask = torch.ones(1, 18, dtype=torch.int64)
    mask[0, -1] = 0
    bounds = torch.tensor([0, 8, 18])
    for message, inputs in {
        "a packed row cannot have an attention mask": {"position_ids": POSITIONS, "attention_mask": mask},
        "position IDs are not consecutive: got 7 and then 9, expected 8, or at most 7": {
            "position_ids": torch.arange(18)[None] + (torch.arange(18) > 7)
        },
        "boundaries of packed sequences cannot be combined with an attention mask": {
            "cu_seq_lens_q": bounds,
            "attention_mask": mask,
        },
        r"cu_seq_lens_k is unsupported: got \[0, 9, 18\], expected cu_seq_lens_q": {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": torch.tensor([0, 9, 18]),
        },
        "positions are not consecutive in a sequence longer than the sliding window of 5: got 7 and then 9": {
            "position_ids": torch.arange(18)[None] + (torch.arange(18) > 7),
            "cu_seq_lens_q": torch.tensor([0, 18]),
        },
        r"mask has the wrong shape: got \(1, 1, 18, 10\), expected": {
            "attention_mask": torch.ones(1, 1, 18, 10).bool()
        },
    }.items():
        with pytest.raises(ps.ConfigurationError, match=message):
            replaced(IDS[:1], use_cache=False, **inputs)


def test_an_attention_with_a_window_takes_consecutive_positions_only():
    context = ps.initialize("torch")
    attention = ps.TrainableFlashAttention(32, 4, 2, 8, sliding_window=4, parallel_context=context)
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, 3, 9], dtype=torch.int32)
    positions = torch.tensor([5, 9, 11, 0, 1, 2, 3, 4, 5])  # gaps do not matter in 3 tokens
    assert torch.equal(attention(hidden, positions, bounds), attention(hidden, None, bounds))
    positions[-1] = 7
    with pytest.raises(
        ps.ConfigurationError, match="longer than the sliding window of 4: got 4 and then 7, expected 5"
    ):
        attention(hidden, positions, bounds)


def test_patterns_that_no_kernel_knows_get_a_dense_mask():
    from transformers.masking_utils import blockwise_overlay, causal_mask_function, or_masks

    groups = torch.tensor([[-1, 0, 0, 0, -1, -1]])
    mask = slot_mask(1, 6, 6, mask_function=or_masks(causal_mask_function, blockwise_overlay(groups)))
    wanted = torch.ones(6, 6, dtype=torch.bool).tril()
    wanted[1:4, 1:4] = True
    assert torch.equal(mask[0, 0], wanted)
    assert slot_mask(1, 6, 6, mask_function=causal_mask_function) is None


def test_a_prescribed_kernel_refuses_what_it_cannot_compute():
    q = torch.zeros(1, 8, 2, 4)
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, 3] = False
    dense = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    for given, reason in (
        (mask, "a mask with gaps in rows longer than the sliding window"),
        (dense, "a mask for every pair"),
    ):
        with pytest.raises(ps.ConfigurationError, match=f"not supported by kernel 'cpu_flash': got {reason}"):
            attend_batch(q, q, q, given, None, sliding_window=4, kernel="cpu_flash")


def test_gradients_with_gaps_in_a_window_are_those_of_the_model_before():
    mask = table.masks()["gaps"]
    found = []
    with torch.enable_grad():
        for model in model_pair("gpt-oss"):
            model.zero_grad()
            logits = model(IDS, attention_mask=mask, use_cache=False).logits
            logits[mask.bool()].square().mean().backward()
            found.append([model.model.embed_tokens.weight.grad, model.model.layers[0].self_attn.sinks.grad])
    for before, after in zip(*found):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-5 + 1e-4 * float(before.abs().max()))


def test_modules_that_are_kept_use_the_same_rules():
    torch.manual_seed(0)
    config = transformers.CohereConfig(**table._SIZES)  # its rotary embedding is another, so it is not replaced
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    options = {"max_new_tokens": 7, "do_sample": False, "attention_mask": table.masks()["left"]}
    static = {**options, "cache_implementation": "static"}
    expected = model.generate(IDS, **options)
    alone = torch.cat([model(part, use_cache=False).logits for part in (IDS[:1, :8], IDS[:1, 8:])], dim=1)
    from polyshard.transformers.replaced.interface import IMPLEMENTATION, register

    register()
    model.set_attn_implementation(IMPLEMENTATION)
    assert torch.equal(model.generate(IDS, **options), expected)
    assert torch.equal(model.generate(IDS, **static), expected)
    packed = model(IDS[:1], position_ids=POSITIONS).logits
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
