"""Access to the state of the torch optimizer that every library wraps, under the names that polyshard stores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from polyshard.core.pieces import OptimizerState, Piece

ADAM = "adam"


def kind(optimizer: Any) -> str:
    """Return `"adam"` for Adam and AdamW, whose states are interchangeable; else the qualified class name."""
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) or hasattr(optimizer, "adam_w_mode"):
        return ADAM
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def materialize(optimizer: Any) -> None:
    """Create the state that the first step would create, so that a checkpoint can be loaded into it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)]
    if not parameters:
        return
    if kind(optimizer) == ADAM:
        for group in optimizer.param_groups:
            names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.get("amsgrad") else [])]
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state.update({name: torch.zeros_like(parameter.detach()) for name in names})
        return
    # Other optimizers: one step with learning rate 0. Loading overwrites the state that it creates.
    held = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
    rates = [group.get("lr") for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group.get("lr"), torch.Tensor) else 0.0
        for parameter, _ in held:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate


def slots(optimizer: Any, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state tensors with as many elements as the parameter, by name."""
    state = optimizer.state.get(parameter, {})
    return {
        name: value
        for name, value in sorted(state.items())
        if isinstance(value, torch.Tensor) and value.numel() == parameter.numel() and name != "step"
    }


def get_step(optimizer: Any) -> int:
    """Return the number of updates so far."""
    steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    steps |= {int(group["step"]) for group in optimizer.param_groups if "step" in group}
    return max(steps, default=0)


def set_step(optimizer: Any, step: int) -> None:
    """Set the number of updates wherever the optimizer stores it."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = step


def state(base: Any, outer: Any, pieces: Iterable[Piece]) -> OptimizerState:
    """Return an engine's optimizer state.

    Args:
        base: the torch optimizer.
        outer: the library's wrapper, whose first parameter group has the learning rate.
        pieces: the pieces of every slot.
    """
    rate = float(outer.param_groups[0]["lr"]) if outer.param_groups else 0.0
    return OptimizerState(kind=kind(base), step=get_step(base), lr=rate, pieces=pieces)
