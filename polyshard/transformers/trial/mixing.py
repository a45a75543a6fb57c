"""Detection of modules that carry state from one sequence of a packed row into the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_SHOWN = 3


@torch.no_grad()
def leaking_modules(model: nn.Module, run: Callable[[torch.Tensor], Any], ids: torch.Tensor, boundary: int) -> str:
    """Name the modules whose output after `boundary` depends on tokens before it.

    A module is named if, for two different beginnings, its inputs after the boundary are equal, its outputs differ, and
    no module inside it is named.

    Args:
        model: its modules process `[1, tokens, ...]`.
        run: calls the model on token IDs.
        ids: `[tokens]`.
        boundary: index of the second sequence's first token.

    Returns:
        Class names with the path of the first module of each class; empty if there is none.
    """
    seen: list[dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]]] = []
    changed = ids.clone()
    changed[:boundary] = changed[:boundary].flip(0)
    for tokens in (ids, changed):
        seen.append(_record(model, run, tokens))
    found: dict[str, str] = {}
    names: list[str] = []
    for name, (inputs, outputs) in seen[0].items():  # inner modules are recorded first
        other_inputs, other_outputs = seen[1].get(name, ([], []))
        if any(inner.startswith(f"{name}.") for inner in names):
            continue
        if _equal(inputs, other_inputs, boundary) and not _equal(outputs, other_outputs, boundary):
            names.append(name)
            found.setdefault(type(model.get_submodule(name)).__name__, name)
    shown = [f"{kind} ({name})" for kind, name in found.items()]
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _record(
    model: nn.Module, run: Callable[[torch.Tensor], Any], ids: torch.Tensor
) -> dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]]:
    record: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = [*args, *(value for _, value in sorted(kwargs.items()))]
            record.setdefault(name, (_states(given), _states(output)))

        return hook

    handles = [
        module.register_forward_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name and next(module.parameters(), None) is not None
    ]
    try:
        run(ids)
    finally:
        for handle in handles:
            handle.remove()
    return record


def _states(value: Any) -> list[torch.Tensor]:
    """Return the hidden states `[1, tokens, ...]` among a module's arguments or results."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v.clone() for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim() >= 2]


def _equal(first: list[torch.Tensor], second: list[torch.Tensor], boundary: int) -> bool:
    if len(first) != len(second):
        return False
    for a, b in zip(first, second):
        if a.shape != b.shape:
            return False
        if a.dim() >= 3 and a.shape[1] > boundary and not torch.allclose(a[:, boundary:], b[:, boundary:], rtol=1e-6):
            return False
    return True
