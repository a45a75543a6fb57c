"""Write docs/reference/attention-caches.md: replaced attention against transformers' own.

python tools/cache_table.py
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.cache_utils import QuantizedLayer

import polyshard as ps

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "attention-caches.md"
EQUAL, REFUSED, DIFFERS = "equal", "refused", "DIFFERS"
LENGTH, WINDOW = 18, 5

_SIZES: dict[str, Any] = {
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
_WINDOW: dict[str, Any] = {"sliding_window": WINDOW}
FAMILIES: dict[str, tuple[str, Any]] = {
    "Llama": ("full attention", transformers.LlamaConfig(**_SIZES)),
    "Mistral": ("windows", transformers.MistralConfig(**_SIZES, **_WINDOW)),
    "Gemma 2": (
        "windows in every other layer, soft-cap",
        transformers.Gemma2Config(**_SIZES, **_WINDOW, query_pre_attn_scalar=24, attn_logit_softcapping=2.0),
    ),
    "Gemma 3": (
        "windows, head norms",
        transformers.Gemma3TextConfig(**_SIZES, **_WINDOW, query_pre_attn_scalar=24),
    ),
    "gpt-oss": (
        "windows in every other layer, sinks",
        transformers.GptOssConfig(**_SIZES, **_WINDOW, num_local_experts=2, num_experts_per_tok=1),
    ),
}

_INTRODUCTION = """# Replaced attention: caches, masks and packing

<!-- made by tools/cache_table.py -->

What a model computes after `ps.replace_with_trainable_attention`, against the same model before, in float32. A test
makes this page again and fails for any cell that is neither "equal" nor a `ConfigurationError`.

- Caches: `DynamicCache` with a config keeps only the window of windowed layers, without one it keeps all tokens.
  Offloaded caches need an accelerator and are not tried here. Every cache is filled in calls of 10, 1, 1, 2 and 4
  tokens. A cache that does not say which of its slots are filled is refused by its name.
- Masks: "gaps" are masked tokens between others. A sliding window counts them, as transformers' does. Rows longer than
  the window are then computed without a flash kernel, and so are 4-D masks; a warning says so once, and a prescribed
  kernel or exact mode refuses them. Logits of masked tokens are not compared, but for the last token of a row, from
  which `generate` goes on: it sees what transformers' eager attention shows it. Where a window holds masked tokens
  only, transformers' implementations disagree, and it sees nothing.
- Packing: a row is several sequences where its position IDs do not grow, or by `cu_seq_lens_q`. Each sequence is
  compared with the same sequence alone. A mask of ones is no mask. Position IDs that leave some out are refused,
  because transformers' implementations disagree about them.
"""


def model_pair(name: str) -> tuple[Any, Any]:
    """A model, and a copy with replaced attention."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name][1], attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)  # far from uniform weights
    replaced = copy.deepcopy(model)
    ps.replace_with_trainable_attention(replaced)
    return model, replaced


def token_ids() -> torch.Tensor:
    """`[3, LENGTH]`."""
    return torch.randint(1, 96, (3, LENGTH), generator=torch.Generator().manual_seed(3))


def masks() -> dict[str, torch.Tensor | None]:
    """Masks by name, each `[3, LENGTH]`."""
    found = {name: torch.ones(3, LENGTH, dtype=torch.int64) for name in ("left", "right", "left and right", "gaps")}
    found["left"][0, :7] = found["left"][1, :2] = 0
    found["right"][0, 11:] = 0
    found["left and right"][0, :6] = found["left and right"][1, 12:] = 0
    gaps = found["gaps"]
    gaps[0, 3:6] = gaps[1, 2] = gaps[1, 8:15] = gaps[2, :4] = gaps[2, 9] = 0
    return {"none": None, **found}


class _Rounding(QuantizedLayer):
    """transformers' quantized cache with a quantizer that needs no other package."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return (tensor * 64).round()

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor / 64


def caches(config: Any) -> dict[str, Callable[[], Any]]:
    """What makes each cache."""
    return {
        "none": lambda: None,
        "dynamic": lambda: transformers.DynamicCache(config=config),
        "dynamic, no config": transformers.DynamicCache,
        "static": lambda: transformers.StaticCache(config=config, max_cache_len=LENGTH + 9),
        "quantized": lambda: transformers.Cache(layers=[_Rounding(nbits=4, residual_length=4) for _ in range(2)]),
    }


def in_calls(model: Any, cache: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits of all tokens; with a cache, over several calls."""
    ids, parts, done = token_ids(), [], 0
    for count in (LENGTH,) if cache is None else (10, 1, 1, 2, 4):
        inputs = {"input_ids": ids[:, done : done + count], "use_cache": cache is not None, "past_key_values": cache}
        done += count
        parts.append(model(**inputs, attention_mask=None if mask is None else mask[:, :done]).logits)
    return torch.cat(parts, dim=1)


def packed_cases(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and arguments of each way to pack sequences of 8 and 10 tokens into one row."""
    positions = {"position_ids": torch.cat((torch.arange(8), torch.arange(10)))[None]}
    bounds = {"cu_seq_lens_q": torch.tensor([0, 8, LENGTH])}
    yield "position IDs", positions | {"use_cache": False}
    yield "position IDs, dynamic cache", positions | {"use_cache": True}
    yield "position IDs, static cache", positions | {"past_key_values": caches(config)["static"]()}
    yield "boundaries", positions | bounds | {"use_cache": False}
    padded = torch.ones(1, LENGTH, dtype=torch.int64)
    padded[0, -1] = 0
    yield "position IDs and a mask", positions | {"attention_mask": padded, "use_cache": False}
    yield "boundaries and a mask", positions | bounds | {"attention_mask": padded, "use_cache": False}
    gaps = torch.cat((torch.arange(4), torch.arange(9, LENGTH + 5)))[None]
    yield "boundaries, positions with gaps", {"position_ids": gaps, "cu_seq_lens_q": torch.tensor([0, LENGTH])}


def verdict(run: Callable[[], torch.Tensor], expected: torch.Tensor) -> str:
    """How the logits compare."""
    try:
        got = run()
    except ps.ConfigurationError:
        return REFUSED
    return EQUAL if float((got - expected).abs().max()) < 2e-4 else DIFFERS


@torch.no_grad()
def family_rows(name: str) -> dict[str, list[str]]:
    """Cells of one family: of each cache the masks, and of each packing one."""
    model, replaced = model_pair(name)
    ids, rows = token_ids(), {}
    for cache, make in caches(model.config).items():
        cells = []
        for mask in masks().values():
            keep = torch.ones(3, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
            expected = in_calls(model, make(), mask)[keep]
            cells.append(verdict(lambda: in_calls(replaced, make(), mask)[keep], expected))  # noqa: B023
        rows[cache] = [*cells, _dense_cell(model, replaced) if cache == "none" else ""]
    alone = torch.cat([model(part, use_cache=False).logits for part in (ids[:1, :8], ids[:1, 8:])], dim=1)
    gaps = torch.zeros(1, 1, 23, dtype=torch.int64)[0]
    gaps[0, [*range(4), *range(9, 23)]] = 1
    spread = torch.zeros(1, 23, dtype=torch.int64).masked_scatter(gaps.bool(), ids[:1])
    with_gaps = model(spread, attention_mask=gaps, use_cache=False).logits[gaps.bool()][None]
    for case, inputs in packed_cases(model.config):
        expected = with_gaps if case.endswith("gaps") else alone
        rows[case] = [verdict(lambda: replaced(ids[:1], **inputs).logits, expected)]  # noqa: B023
    return rows


def _dense_cell(model: Any, replaced: Any) -> str:
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    seen[:6, :6] = True  # a prefix that sees itself both ways
    added = torch.zeros(3, 1, LENGTH, LENGTH).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = model(token_ids(), attention_mask=added, use_cache=False).logits
    verdicts = {
        verdict(lambda: replaced(token_ids(), attention_mask=mask, use_cache=False).logits, expected)  # noqa: B023
        for mask in (added, seen.expand(3, 1, -1, -1))
    }
    return verdicts.pop() if len(verdicts) == 1 else DIFFERS


def page(found: dict[str, dict[str, list[str]]]) -> str:
    """The page's text."""
    names = [*masks(), "4-D"]
    lines = [_INTRODUCTION]
    lines += ["| family | cache | " + " | ".join(f"mask: {name}" for name in names) + " |"]
    lines += ["|---" * (len(names) + 2) + "|"]
    for family, rows in found.items():
        tables = [(cache, cells) for cache, cells in rows.items() if len(cells) > 1]
        lines += [f"| {family} | {cache} | " + " | ".join(cells) + " |" for cache, cells in tables]
    lines += ["", "| packed by | " + " | ".join(f"{name}: {FAMILIES[name][0]}" for name in found) + " |"]
    lines += ["|---" * (len(found) + 1) + "|"]
    packed = [case for case, cells in next(iter(found.values())).items() if len(cells) == 1]
    lines += [f"| {case} | " + " | ".join(rows[case][0] for rows in found.values()) + " |" for case in packed]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    PAGE.write_text(page({name: family_rows(name) for name in FAMILIES}))
