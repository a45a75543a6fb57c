"""The parameters that an engine was built for, which a program may change afterwards without the engine's knowledge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyshard.core.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class BuiltParameters:
    """A model's parameters when its engine was built.

    Attributes:
        trained: whether each parameter requires a gradient, by its name.
        held: the parameters and their dtypes, by name; none if the engine exchanges them for shards.
    """

    trained: Mapping[str, bool]
    held: Mapping[str, tuple[nn.Parameter, torch.dtype]]

    @classmethod
    def of(cls, module: nn.Module, *, sharded: bool) -> BuiltParameters:
        """Record the parameters of a model after its engine was built."""
        named = dict(module.named_parameters())
        held = {} if sharded else {name: (parameter, parameter.dtype) for name, parameter in named.items()}
        return cls({name: parameter.requires_grad for name, parameter in named.items()}, held)

    def check(self, module: nn.Module) -> None:
        """Check that the engine still trains the parameters of the model, and all of them.

        Raises:
            ConfigurationError: one was frozen, unfrozen, cast or replaced. Libraries would not average the gradient of
                an unfrozen parameter, go on moving a frozen one, or train a tensor that the model no longer uses.
        """
        found: dict[str, Any] = dict(module.named_parameters())
        for name, trained in self.trained.items():
            if name not in found:
                raise _changed(name, "no parameter", "the one that the engine trains")
            if found[name].requires_grad != trained:
                raise _changed(name, f"requires_grad={found[name].requires_grad}", f"{trained}")
        for name, (parameter, dtype) in self.held.items():
            if found[name] is not parameter:
                raise _changed(name, "another tensor", "the one that the engine trains")
            if found[name].dtype != dtype:
                raise _changed(name, f"{found[name].dtype}", f"{dtype}")


def check_grad_enabled() -> None:
    """Check that a backward pass is possible.

    Raises:
        ConfigurationError: gradients are disabled.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise ConfigurationError(
            "train_batch needs gradients: got a call under torch.no_grad() or torch.inference_mode(), expected enabled "
            "gradients. Call it outside, or call eval_batch for the loss only."
        )


def _changed(name: str, got: str, expected: str) -> ConfigurationError:
    return ConfigurationError(
        f"parameter {name} was changed after the engine was built: got {got}, expected {expected}. Change the model "
        "before you build its engine, or call engine.close() and build another engine."
    )
