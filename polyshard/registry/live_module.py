"""Serving a live module: the engine's copy shares the module's parameters and uses the engine's attention.

The engine gets a copy of the module's structure. Its parameters are separate objects over the same memory, without
gradients. The trainer keeps its own module, hooks, optimizer and autograd, and the engine sees the updated weights.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import RegistrationError
from polyshard.core.serving import EngineAttention
from polyshard.core.weight_table import collect_layouts
from polyshard.layers.token_ids import IdCheck

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_INSTEAD = "register its factory, and send the trainer's weights to the engine with polyshard.WeightSync"


@dataclass(frozen=True, slots=True)
class LiveModel:
    """A factory that returns a copy of a live module."""

    module: nn.Module

    def __call__(self, config: Any, parallel_context: ParallelContext) -> nn.Module:
        """Return the module for an engine; see `served_copy`."""
        del config  # the module was built from its own
        return served_copy(self.module, parallel_context)


def served_copy(model: nn.Module, context: ParallelContext) -> nn.Module:
    """Return a module of the same structure over the same memory, in evaluation mode, with the engine's attention.

    Args:
        model: a model as its factory built it, or the `module` of a training engine.
        context: the engine's parallel context.

    Raises:
        RegistrationError: the parameters are on another device or belong to another rank, a module's forward was
            replaced, or no attention module can be served; the message names the module.
    """
    _check_parameters(model, context)
    _check_state(model)
    copied: dict[int, Any] = {}
    served = _copy_module(model, "", copied)
    modules: list[Any] = list(served.modules())
    attentions: list[EngineAttention] = [m for m in modules if callable(getattr(m, "serve_in", None))]
    if not attentions:
        raise RegistrationError(
            f"{type(model).__name__} has no attention that an engine can serve: expected TrainableFlashAttention or "
            "TrainableMLA. Call ps.replace_with_trainable_attention on models of transformers."
        )
    for attention in attentions:
        attention.serve_in(context)
    return served


def _check_state(model: nn.Module) -> None:
    """Reject modules that could not use an engine's cache: layers with a state, and attention that was not replaced."""
    for name, module in model.named_modules():
        refusal = getattr(module, "packed_refusal", None)
        if refusal is not None:
            raise RegistrationError(f"{refusal}, and an engine packs sequences. Serve another model.")
        kept = "Attention" in type(module).__name__ and isinstance(getattr(module, "layer_idx", None), int)
        if kept and not callable(getattr(module, "serve_in", None)):
            raise RegistrationError(
                f"{name} ({type(module).__name__}) is unsupported attention, which would run without the engine's "
                "cache. Replace all attention modules, or register a factory."
            )


def _copy_module(module: nn.Module, name: str, copied: dict[int, Any]) -> nn.Module:
    """Copy a module; `copied` maps original IDs to copies, so that shared objects stay shared."""
    if id(module) in copied:
        return copied[id(module)]
    shown = name or type(module).__name__
    if "forward" in vars(module):
        raise RegistrationError(f"{shown} has a replaced forward (compiled or wrapped): {_INSTEAD}")
    hooks = (hook for kind in _HOOKS for hook in getattr(module, kind).values())
    if not all(isinstance(hook, IdCheck) for hook in hooks):
        raise RegistrationError(f"{shown} has forward hooks, which an engine would run or lose: {_INSTEAD}")
    new = object.__new__(type(module))
    copied[id(module)] = new
    fields = vars(new)
    for key, value in vars(module).items():
        if key == "_parameters":
            fields[key] = {leaf: _copy_parameter(p, copied) for leaf, p in value.items()}
        elif key == "_modules":
            fields[key] = {
                leaf: None if child is None else _copy_module(child, f"{name}.{leaf}".lstrip("."), copied)
                for leaf, child in value.items()
            }
        elif key.endswith("_hooks") and isinstance(value, dict):
            fields[key] = OrderedDict()
        else:
            fields[key] = _copy_value(value, f"{name}.{key}".lstrip("."), copied)
    fields["training"] = False
    return new


def _copy_parameter(parameter: nn.Parameter | None, copied: dict[int, Any]) -> nn.Parameter | None:
    if parameter is None:
        return None
    if id(parameter) not in copied:
        new = nn.Parameter(parameter.detach(), requires_grad=False)
        vars(new).update(vars(parameter))  # attributes that a library has set on it
        copied[id(parameter)] = new
    return copied[id(parameter)]


def _copy_value(value: Any, name: str, copied: dict[int, Any]) -> Any:
    """Copy containers, and modules in them; return other values unchanged."""
    if isinstance(value, nn.Parameter):
        return _copy_parameter(value, copied)
    if isinstance(value, nn.Module):
        return _copy_module(value, name, copied)
    if type(value) in (list, tuple, set):
        return type(value)(_copy_value(item, name, copied) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copy_value(item, name, copied)) for key, item in value.items())
    return value


def _check_parameters(model: nn.Module, context: ParallelContext) -> None:
    rank, size = context.get_tensor_parallel_rank(), context.get_tensor_parallel_world_size()
    default, parameters = torch.get_default_dtype(), dict(model.named_parameters())
    for name, entry in collect_layouts(model).items():
        parameter, expected = parameters[name], entry.layout.local_shape(rank, size)
        experts = entry.layout.experts
        if experts is not None and experts.count != experts.total:
            raise RegistrationError(
                f"{name} is incompatible: got {experts.count} of {experts.total} experts on this rank, expected all of "
                f"them. An engine cannot share experts that are distributed over ranks: {_INSTEAD}"
            )
        if type(parameter) is not nn.Parameter or hasattr(parameter, "ds_id") or tuple(parameter.shape) != expected:
            raise RegistrationError(
                f"{name} is incompatible: got a {type(parameter).__name__} {list(parameter.shape)}, expected a "
                f"Parameter {list(expected)} on rank {rank} of {size}. An engine can only share the memory of an "
                f"unsharded trainer with its own tensor-parallel size. Otherwise {_INSTEAD}"
            )
        if parameter.device.type != context.device.type:
            raise RegistrationError(f"{name} is on {parameter.device}, but the engine runs on {context.device}")
        if parameter.dtype != default:
            raise RegistrationError(
                f"{name} has the wrong dtype: got {str(parameter.dtype).removeprefix('torch.')}, expected "
                f"{str(default).removeprefix('torch.')}. Start the engine with dtype="
                f"{str(parameter.dtype).removeprefix('torch.')!r}, or {_INSTEAD}"
            )
