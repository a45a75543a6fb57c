"""Checks of an optimizer against the model that it gets, and the settings of its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.parameter_groups import LR_SCALE, GroupSettings, ParameterGroup
from polyshard.core.ranks import Ranks
from polyshard.core.weight_table import WeightEntry, WeightTable
from polyshard.training.muon import MuonWithAdamW

Held = Literal["whole", "rows", "flat"]  # tensor-parallel shards, DTensors of their rows, or runs of flattened shards


def check_patterns(optimizer: Any, table: WeightTable, context: ParallelContext) -> None:
    """Check that each pattern of the optimizer's groups matches a parameter on some rank. A collective.

    A frozen parameter counts, and so does one that an earlier group takes.

    Raises:
        ConfigurationError: a pattern matches nothing, the groups are not groups, or the optimizer has been built or is
            no function.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(
            f"the optimizer has been built: got {type(optimizer).__name__}, expected its settings, because the engine "
            "may replace the parameters. Pass ps.AdamW(...), ps.TorchOptimizer(cls, ...) or a function of named "
            "parameters."
        )
    if not callable(optimizer):
        raise ConfigurationError(
            f"the optimizer is invalid: got {optimizer!r}, expected ps.AdamW(...), ps.TorchOptimizer(cls, ...), "
            "ps.Muon(...) or a function of named parameters."
        )
    groups = getattr(optimizer, "groups", ())
    if not isinstance(groups, Sequence) or not all(isinstance(group, ParameterGroup) for group in groups):
        raise ConfigurationError(f"the optimizer's groups are invalid: got {groups!r}, expected ParameterGroups.")
    exclude = getattr(optimizer, "exclude", ())
    if isinstance(exclude, str):
        raise ConfigurationError(
            f"the optimizer's exclude is invalid: got {exclude!r}, expected a tuple of patterns. Pass ({exclude!r},)."
        )
    patterns = [*exclude, *(group.pattern for group in groups)]
    if not patterns:
        return
    names = [entry.name for entry in table.values()]
    mine = {pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)}
    matched = set().union(*Ranks.of(context).gather(mine))
    unmatched = [pattern for pattern in patterns if pattern not in matched]
    if not unmatched:
        return
    tied = [f"{other} is tied to {entry.name}" for entry in table.values() for other in entry.tied_names]
    meant = [text for text in tied if any(fnmatchcase(text.split()[0], pattern) for pattern in unmatched)]
    raise ConfigurationError(
        f"the optimizer's pattern {unmatched[0]!r} matches no parameter: got {', '.join(names[:8])}"
        f"{', ...' if len(names) > 8 else ''}, expected a pattern of one of these names."
        f"{''.join(f' {text}.' for text in meant[:2])}"
    )


def check_built(built: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """Check that a function has returned an optimizer of exactly the parameters that require a gradient.

    Nothing would clear the gradient of a parameter that is left out, and it would count in the norm.

    Args:
        built: what the function returned.
        parameters: those that it was given, by canonical name.

    Raises:
        ConfigurationError: it is no optimizer of torch, a parameter is missing, or the optimizer has other parameters.
    """
    if not isinstance(built, torch.optim.Optimizer):
        raise ConfigurationError(
            f"the optimizer's function returns no optimizer: got {type(built).__name__}, expected a "
            "torch.optim.Optimizer of the named parameters that it is given."
        )
    updated = {id(parameter) for group in built.param_groups for parameter in group["params"]}
    if updated - {id(parameter) for parameter in parameters.values()}:
        raise ConfigurationError(
            f"{type(built).__name__} updates other parameters than the engine trains: expected only those that its "
            "function is given, because the engine may have replaced those of the model."
        )
    missing = [name for name, p in parameters.items() if p.requires_grad and id(p) not in updated]
    if missing:
        raise ConfigurationError(
            f"{type(built).__name__} leaves out parameters that require a gradient: got none of "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. Add them to the optimizer, or freeze them "
            "with requires_grad_(False) before the engine is built."
        )


def check_elementwise(
    optimizer: torch.optim.Optimizer,
    entries: Iterable[WeightEntry],
    parameters: Mapping[str, nn.Parameter],
    tensor_size: int,
    held: Held,
) -> None:
    """Refuse optimizers of torch that would be another optimizer on a part of a weight.

    Args:
        optimizer: as built.
        entries: of the weight table.
        parameters: by canonical name.
        tensor_size: size of the tensor axis.
        held: what the optimizer updates.

    Raises:
        ConfigurationError: the optimizer needs whole matrices, and a weight is sharded or fused; or it needs a closure;
            or the library cannot run it on its parts.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, MuonWithAdamW):
        if held == "flat":
            raise ConfigurationError(
                "Muon needs whole matrices: got an engine that updates runs of flattened weights. Use zero_stage=0, or "
                "another library."
            )
        return
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigurationError("LBFGS is unsupported: it evaluates the loss several times in a step. Use AdamW.")
    # Source: zero/stage_1_and_2.py and stage3.py of DeepSpeed.
    if isinstance(optimizer, torch.optim.Adagrad) and held == "flat":
        raise ConfigurationError(
            "Adagrad is unsupported with ZeRO: DeepSpeed builds it again, without the rates and decays of parameter "
            "groups. Use AdamW, or zero_stage=0."
        )
    if isinstance(optimizer, torch.optim.Rprop) and held == "rows":
        raise ConfigurationError(
            "Rprop is unsupported with FSDP2: it writes through masks, which DTensors do not support. Use AdamW, or "
            "data_parallel='ddp'."
        )
    needs_matrices = tuple(
        cls for cls in (getattr(torch.optim, n, None) for n in ("Muon", "Adafactor")) if cls is not None
    )
    if not isinstance(optimizer, needs_matrices):
        return
    advice = "Use polyshard.Muon." if name == "Muon" else "Use AdamW."
    if held != "whole":
        raise ConfigurationError(
            f"{name} needs whole matrices: got the parts of them that FSDP or ZeRO leaves on a rank. {advice}"
        )
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for entry in entries:
        cut = entry.layout.dim is not None and tensor_size > 1
        fused = name == "Muon" and len(entry.layout.segments) > 1
        if entry.name in parameters and id(parameters[entry.name]) in updated and (cut or fused):
            why = "a shard of" if cut else f"{len(entry.layout.segments)} matrices fused in"
            raise ConfigurationError(f"{name} needs whole matrices: got {why} {entry.name}. {advice}")


def settings_of_groups(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, GroupSettings]:
    """Return the settings of each parameter that an optimizer updates, by the names in `parameters`."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {
        names[id(parameter)]: GroupSettings(
            lr_scale=group[LR_SCALE], weight_decay=float(group.get("weight_decay", 0.0))
        )
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
