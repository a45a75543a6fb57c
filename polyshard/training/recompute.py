"""Recomputation of activations: a block keeps its input, and its forward runs again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from polyshard.attention.kernels import attention_operator as operator  # registers `polyshard::attention`
from polyshard.core.errors import ConfigurationError
from polyshard.experts.step_routing import recalled
from polyshard.layers import collective_operators as collectives
from polyshard.training.blocks import chosen_modules, replace_forwards

Mode = Literal["none", "selective", "full"]
Recompute = Mode | Callable[[nn.Module], bool]

_ATTENTION = (getattr(torch.ops.polyshard, operator.NAME).default,)
_MATMULS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.linear.default,
)
# Layers that sum over ranks out of place. Megatron's, for one, sum into the output of the matrix product: kept for the
# backward pass, it would be summed twice, and torch does not notice, since collectives count no version.
_OUT_OF_PLACE = ("torch.", "polyshard.")


def apply_recomputation(model: nn.Module, recompute: Recompute) -> Callable[[], None]:
    """Recompute the activations of blocks in the backward pass; gradients stay equal bit for bit, dropout included.

    Blocks are the items of every `ModuleList`. Their `forward` is replaced on the instance, so that parameters keep
    their names. Call it before a model is wrapped for data parallelism.

    Args:
        model: as built.
        recompute: `"full"` keeps only the input of each block. `"selective"` also keeps the outputs of attention and of
            the collectives of torch's layers, and those of matrix products if all layers are torch's or polyshard's.
            `"none"` changes nothing. A function chooses modules that are recomputed in full.

    Returns:
        A function that undoes it.

    Raises:
        ConfigurationError: an unknown mode, or no module to recompute.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        >>> undo = apply_recomputation(model, lambda module: isinstance(module, torch.nn.Linear))
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> undo()
    """
    if recompute not in get_args(Mode) and not callable(recompute):
        raise ConfigurationError(
            f"recompute is invalid: got {recompute!r}, expected one of {', '.join(map(repr, get_args(Mode)))}, or a "
            "function of a module."
        )
    if recompute == "none":
        return lambda: None
    chosen = chosen_modules(model, "recompute", recompute, recompute if callable(recompute) else None)
    kept: tuple[Any, ...] | None = None
    if recompute == "selective":
        kept = _ATTENTION + collectives.OPERATORS + (_MATMULS if _sums_out_of_place(model) else ())
    bind = recalled(model)
    return replace_forwards(chosen, lambda forward: _recomputed(forward, kept, bind))


def _sums_out_of_place(model: nn.Module) -> bool:
    """Whether every module with parameters of its own is of a library whose collectives leave their input alone."""
    owners = (type(module) for module in model.modules() if next(module.parameters(recurse=False), None) is not None)
    return all(f"{owner.__module__}.".startswith(_OUT_OF_PLACE) for owner in owners)


def _recomputed(
    forward: Callable[..., Any], kept: tuple[Any, ...] | None, bind: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[..., Any]:
    """Wrap a forward; `kept` are operators whose outputs are kept, and None keeps none; `bind` is `recalled`'s."""
    options: dict[str, Any] = {"use_reentrant": False}
    if kept is not None:
        policy = functools.partial(_policy, kept)
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(bind(forward), *args, **options, **kwargs)

    return run


def _policy(kept: tuple[Any, ...], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    del context, args, kwargs
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE
