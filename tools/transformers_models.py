"""Write docs/reference/transformers-models.md: what polyshard does with each model of transformers.

python tools/transformers_models.py
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from model_families import VARIANTS, families, small_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import polyshard as ps
from polyshard.transformers.kept_attention import is_attention
from polyshard.transformers.trial.simulation import Exchange, Schedule, simulated_context

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "transformers-models.md"
YES = "yes"
_WAYS = {"rows": (1, False), "sharded": (2, False), "served": (1, True)}  # tensor-parallel size, in an engine

# What a refusal says, and how the table says it.
_REASONS = {
    "has a mixture of experts": "experts",
    "is not the config of a plain text decoder": "more than a text decoder",
    "in another form than its parameters": "checkpoints in another form",
    "shares weights between layers": "shared layers",
    "buffers beside its parameters": "weights in buffers",
    "does not use transformers' attention interface": "own attention code",
    "has no tensor-parallel plan": "no plan",
    "is not causal": "not causal",
    "differs from transformers' own code": "differs",
    "cannot be run on rows": "cannot be run",
    "on rows of one sequence: the attention mask": "mask not supported",
    "cannot be reduced to a size": "cannot be compared",
    "transformers cannot build the model": "transformers cannot build it",
    "transformers has no causal language model": "an encoder's config",
    "carries state from token to token": "state",
    "that depends on the longest sequence": "rotary embedding by length",
    "its logits depend on the batch": "differs",
    "the plan of": "plan not supported",
}

_INTRODUCTION = f"""# Models of transformers, one by one

<!-- made by tools/transformers_models.py -->

What `polyshard.transformers_model` does with every causal language model of transformers {transformers.__version__},
tried with a small configuration of the family's own layer pattern, windows and biases. Every cell that is not "yes" is
a `ConfigurationError`, raised before any weight is loaded; its message gives the details. A test checks this page and
compares each "yes" with transformers.

| column | what is equal to transformers' own model |
|---|---|
| rows | logits of rows of one sequence each, in training |
| packed | logits of several sequences packed into one row |
| tensor parallel | logits at tensor-parallel size 2. "attention replicated": every rank computes all heads. |
| served | logits in the steps of a serving engine: chunked prefill, decode, several sequences in a batch |

| refusal | meaning |
|---|---|
| experts | It has a mixture of experts that differs from `polyshard.mixture_of_experts`. |
| more than a text decoder | The config describes an encoder, or vision or audio parts, too. Use its text config. |
| own attention code | Attention does not go through transformers' attention interface. |
| no plan | transformers has no tensor-parallel plan for the family. |
| plan not supported | transformers' plan asks for a way of sharding that is not available. |
| state | A layer other than attention carries state from token to token (recurrence, convolution, linear attention). |
| rotary embedding by length | Rotary frequencies depend on the longest sequence of the batch. |
| not causal | The config describes a bidirectional model; a serving engine holds causal ones. |
| weights in buffers | Learned values are stored in buffers, and checkpoints hold only parameters. |
| shared layers | Layers share weights, which polyshard's layers would not. |
| checkpoints in another form | transformers converts tensors when it loads a checkpoint. |
| mask not supported | Attention takes a mask that flash kernels do not take. |
| differs | The logits differ for another reason. |
| cannot be compared, cannot be run, transformers cannot build it, an encoder's config | The message says why. |
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one family.

    Attributes:
        cells: of the columns rows, packed, sharded and served: `YES`, or why not.
        messages: what the errors said.
        keeps_attention: whether attention keeps transformers' code at tensor-parallel size 2.
    """

    cells: dict[str, str]
    messages: dict[str, str]
    keeps_attention: bool = False


def outcome(config: Any) -> Outcome:
    """Ask `transformers_model` for a model in each way."""
    cells, messages, attention = {}, {}, []
    for way, (size, served) in _WAYS.items():
        context = simulated_context(0, Exchange(size), Schedule() if served else None)
        try:
            model = ps.transformers_model(config, context)
        except ps.ConfigurationError as error:
            cells[way], messages[way] = reason(str(error)), str(error)
            if way == "rows":
                return Outcome(dict.fromkeys((*_WAYS, "packed"), cells[way]), messages)
            continue
        cells[way] = YES
        if way == "sharded":
            attention = [module for module in model.modules() if is_attention(module)]
            projections = [child for module in attention for child in module.children()]
            if any(type(child) is torch.nn.Linear for child in projections):
                cells[way] += ", attention replicated"
        if way == "rows":
            refusal = model.packed_refusal
            cells["packed"] = YES if refusal is None else reason(refusal)
            messages["packed"] = refusal or ""
    return Outcome(cells, messages, bool(attention))


def reason(message: str) -> str:
    """The table's words for an error.

    Raises:
        ValueError: the message is not known here.
    """
    for part, words in _REASONS.items():
        if part in message:
            return words
    raise ValueError(f"tools/transformers_models.py has no words for this refusal: {message}")


def outcomes(names: Sequence[str] | None = None) -> dict[str, Outcome]:
    """Of these families, by default of all."""
    with _quiet():
        return {name: _family(name) for name in (families() if names is None else names)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings of polyshard and transformers; both loggers get their levels back."""
    loggers = {name: logging.getLogger(name) for name in ("polyshard", "transformers")}
    levels = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


def _family(name: str) -> Outcome:
    try:
        config = small_config(name)
    except Exception as error:  # of whatever a config class raises for its own defaults
        return Outcome(dict.fromkeys((*_WAYS, "packed"), "transformers cannot build it"), {"rows": str(error)})
    return outcome(config)


def page(found: dict[str, Outcome]) -> str:
    """The page's text."""
    supported = [name for name, o in found.items() if o.cells["rows"] == YES]
    lines = ["## Supported", "", "| model | rows | packed | tensor parallel | served |", "|---|---|---|---|---|"]
    lines += [row(name, found[name]) for name in supported]
    lines += ["", "## Refused", "", "| refusal | models |", "|---|---|"]
    refused: dict[str, list[str]] = {}
    for name, o in found.items():
        if name not in supported:
            refused.setdefault(o.cells["rows"], []).append(_shown(name))
    lines += [f"| {words} | {', '.join(names)} |" for words, names in sorted(refused.items())]
    return _INTRODUCTION + "\n" + "\n".join(lines) + "\n"


def row(name: str, found: Outcome) -> str:
    """The line of a supported family."""
    columns = (found.cells[column] for column in ("rows", "packed", "sharded", "served"))
    return f"| {_shown(name)} | {' | '.join(columns)} |"


def _shown(name: str) -> str:
    model_type, _, variant = name.partition(", ")
    if name in VARIANTS:
        return f"`{model_type}`, {variant}"
    kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    return f"`{name}`" if re.sub(r"\W|_", "", name).lower() in kind.lower() else f"`{name}` ({kind})"


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page(outcomes()))
