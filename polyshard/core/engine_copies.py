"""A mark on models whose engine updates float32 copies or shards of the weights instead of the parameters."""

from __future__ import annotations

from typing import Literal

from torch import nn

from polyshard.core.errors import ConfigurationError

Held = Literal["copies", "shards"]

_ATTRIBUTE = "_polyshard_engine_holds"


def mark_held(module: nn.Module, held: Held | None) -> None:
    """Note what the optimizer of a module's engine updates; None for the parameters themselves.

    Args:
        module: the model.
        held: `"copies"` of the parameters, from which each step overwrites them, or `"shards"` of them.
    """
    setattr(module, _ATTRIBUTE, None if held is None else (id(module), held))  # a deep copy has no engine


def check_not_held(module: nn.Module, *, written: bool) -> None:
    """Check that the parameters of a module may be used without its engine.

    Args:
        module: the model.
        written: whether they would be written; copies would overwrite them in the next step.

    Raises:
        ConfigurationError: an engine holds the weights.
    """
    mark = getattr(module, _ATTRIBUTE, None)
    if mark is None or mark[0] != id(module) or (mark[1] == "copies" and not written):
        return
    raise ConfigurationError(
        f"the weights belong to an engine, which keeps {mark[1]} of them: got its model, expected the engine. Pass the "
        "engine, or use the model before you build an engine around it."
    )
