"""Access to the state of the torch optimizer that every library wraps, under the names that polyshard stores."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from polyshard.core.errors import CheckpointError
from polyshard.training.muon import MuonWithAdamW

logger = logging.getLogger(__name__)

ADAM = "adam"
PLACEHOLDER = "polyshard_placeholder"  # the key of state that no step has made


def kind(optimizer: Any) -> str:
    """Return `"adam"` for Adam and AdamW, whose states are interchangeable, `"muon"`, or the qualified class name."""
    if isinstance(optimizer, MuonWithAdamW):
        return optimizer.kind
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) or hasattr(optimizer, "adam_w_mode"):
        return ADAM
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def materialize(optimizer: Any) -> None:
    """Create the state that the first step would create, so that a checkpoint can be loaded into it."""
    if isinstance(optimizer, MuonWithAdamW):
        optimizer.create_state()
        if optimizer.adamw is None:
            return
        optimizer = optimizer.adamw
    parameters = [p for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)]
    if not parameters:
        return
    if kind(optimizer) == ADAM:
        for group in optimizer.param_groups:
            names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.get("amsgrad") else [])]
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if not state:
                    on_device = group.get("fused") or group.get("capturable")
                    device = parameter.device if on_device else torch.device("cpu")
                    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                    state.update({name: torch.zeros_like(parameter.detach()) for name in names})
        return
    # Other optimizers: one step with learning rate 0. Its state is not that of a new optimizer (a count is 1), so it is
    # marked, and dropped before the first real step unless a checkpoint overwrites it. Parameters that have state get
    # no gradient, or the step would change their state.
    held = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
    settings = [
        {name: group[name] for name in ("lr", "weight_decay") if name in group} for group in optimizer.param_groups
    ]
    try:
        for group, values in zip(optimizer.param_groups, settings):
            group.update({n: torch.zeros_like(v) if isinstance(v, torch.Tensor) else 0.0 for n, v in values.items()})
        for parameter, _ in held:
            parameter.grad = None
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient
        for group, values in zip(optimizer.param_groups, settings):
            group.update(values)
    for parameter in parameters:
        optimizer.state[parameter][PLACEHOLDER] = True

    waiting = [True]

    def drop(optimizer: Any, args: Any, kwargs: Any) -> None:
        if waiting:  # a hook cannot remove itself while torch iterates over the hooks
            waiting.clear()
            for parameter, state in list(optimizer.state.items()):
                if PLACEHOLDER in state:
                    del optimizer.state[parameter]

    optimizer.register_step_pre_hook(drop)


def is_started(optimizer: Any) -> bool:
    """Return whether there is state other than placeholders on this rank."""
    return any(PLACEHOLDER not in state for state in optimizer.state.values())


def set_started(optimizer: Any, started: bool) -> None:
    """Keep placeholders, into which values were written; or drop all state, which the next step creates."""
    if not started:
        optimizer.state.clear()
    for state in optimizer.state.values():
        state.pop(PLACEHOLDER, None)


def slots(optimizer: Any, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state tensors with the parameter's shape, by name.

    Raises:
        CheckpointError: there is a tensor of another shape.
    """
    found: dict[str, torch.Tensor] = {}
    for name, value in sorted(optimizer.state.get(parameter, {}).items()):
        if isinstance(value, torch.Tensor) and name != "step" and not _is_scalar(value, parameter):
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"the state {name!r} of {type(optimizer).__name__} cannot be stored: got shape "
                    f"{tuple(value.shape)}, expected the parameter's, {tuple(parameter.shape)}. Use another optimizer, "
                    "or save with save_checkpoint."
                )
            found[name] = value
    return found


def scalars(optimizer: Any) -> dict[str, float]:
    """Return the numbers that the optimizer keeps for each parameter, besides the count of steps.

    Raises:
        CheckpointError: one differs between parameters.
    """
    found: dict[str, set[float]] = {}
    for parameter, state in optimizer.state.items():
        for name, value in () if PLACEHOLDER in state else state.items():
            if name != "step" and _is_scalar(value, parameter):
                found.setdefault(name, set()).add(float(value))
    differing = [name for name, values in found.items() if len(values) > 1]
    if differing:
        raise CheckpointError(
            f"the state {differing[0]!r} of {type(optimizer).__name__} cannot be stored: got "
            f"{sorted(found[differing[0]])[:3]}, expected one number for all parameters."
        )
    return {name: values.pop() for name, values in found.items()}


def set_scalars(optimizer: Any, values: Mapping[str, float]) -> None:
    """Set the numbers that `scalars` returned."""
    for state in optimizer.state.values():
        for name, value in values.items():
            if name in state:
                held = state[name]
                state[name] = torch.full_like(held, value) if isinstance(held, torch.Tensor) else value


def _is_scalar(value: Any, parameter: torch.Tensor) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and parameter.dim() > 0
    return isinstance(value, (int, float))


def get_step(optimizer: Any) -> int:
    """Return the number of updates so far: the largest, with a warning, if some parameters had fewer gradients."""
    steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state and PLACEHOLDER not in state}
    steps |= {int(group["step"]) for group in optimizer.param_groups if "step" in group}
    if len(steps) > 1:
        logger.warning(
            "parameters have had %d to %d updates, because some got no gradient: a training state counts %d for all",
            min(steps),
            max(steps),
            max(steps),
        )
    return max(steps, default=0)


def set_step(optimizer: Any, step: int) -> None:
    """Set the number of updates wherever the optimizer stores it."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = step
