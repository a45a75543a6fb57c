"""Weights from vLLM's loader into a served model, through the weight layouts.

Data reaches a parameter only through its `weight_loader`, which is looked up at load time: vLLM's reload replaces the
parameters, and a direct copy would then be lost without a word.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from polyshard.adapters.vllm.served.quantized import QuantizedLayers, QuantizedLoading
from polyshard.checkpoint.quantization.detect import FLOATS, short
from polyshard.core.context import ParallelContext
from polyshard.core.errors import CheckpointError, RegistrationError
from polyshard.core.weight_layout import WeightLayout
from polyshard.core.weight_table import IGNORED_TENSORS, WeightEntry, WeightTable, copy_into_shard, stored_shape


def shard_loader(layout: WeightLayout, count: int, rank: int, size: int) -> Callable[..., None]:
    """The `weight_loader` of a parameter whose layer brings none: copies this rank's part.

    A function whose first argument is called `param`: vLLM's reload asks for its name, and binds that argument anew.
    """

    def load(param: torch.Tensor, loaded_weight: torch.Tensor, index: int = 0) -> None:
        copy_into_shard(param, layout, count, index, loaded_weight, rank, size)

    return load


def attach_loaders(model: nn.Module, table: WeightTable, context: ParallelContext) -> None:
    """Give a `shard_loader` to every parameter without a loader of its own."""
    rank, size = context.get_tensor_parallel_rank(), context.get_tensor_parallel_world_size()
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "weight_loader"):
            entry = table[name]
            loader = shard_loader(entry.layout, len(entry.checkpoint_names), rank, size)
            parameter.weight_loader = loader  # pyrefly: ignore  # vLLM's own convention


def packed_names(table: WeightTable, name: str) -> dict[str, list[str]]:
    """Each fused layer's own name, with the names of its projections in a checkpoint, as vLLM's LoRA asks it.

    Raises:
        RegistrationError: layers of one name are fused from differently named projections.
    """
    found: dict[str, list[str]] = {}
    for entry in table.values():
        layer, _, kind = entry.parameter.rpartition(".")
        if kind != "weight" or len(entry.checkpoint_names) == 1:
            continue
        fused = layer.rpartition(".")[2]
        parts = [stored.split(".")[-2] for stored in entry.checkpoint_names]
        if found.setdefault(fused, parts) != parts:
            raise RegistrationError(
                f"model {name!r}: layers called {fused!r} are fused from {found[fused]} and from {parts}; "
                "vLLM tells layers apart by that name: give them different ones"
            )
    return found


def keep_buffers(model: nn.Module) -> None:
    """Make every buffer non-persistent: vLLM's reload leaves persistent ones uninitialised, without a word.

    No checkpoint holds them: loading fills parameters alone.
    """
    for module in model.modules():
        module._non_persistent_buffers_set.update(module._buffers)


def load_weights(
    model: nn.Module,
    table: WeightTable,
    weights: Iterable[tuple[str, torch.Tensor]],
    name: str,
    rename: Callable[[str], str],
    elsewhere: frozenset[str],
    quantized: QuantizedLayers | None = None,
) -> set[str]:
    """Load each parameter exactly once.

    Args:
        model: as the factory built it.
        table: its layouts.
        weights: names and full tensors as stored.
        name: the architecture, for messages.
        rename: from a stored name to that of the model's layers.
        elsewhere: names of the weights that other pipeline stages hold.
        quantized: layers that load codes and scales in place of weights.

    Returns:
        Names, in the model, of the parameters that were loaded: all of them.

    Raises:
        CheckpointError: tensors are missing, unexpected, doubled, of another shape, or not finite; all are listed.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets = table.by_checkpoint_name()
    coded = None
    if quantized is not None:
        coded = QuantizedLoading(quantized.parts)
        targets = {stored: found for stored, found in targets.items() if found[0].parameter not in quantized.weights}
    tied = {other: entry.checkpoint_names[0] for entry in table.values() for other in entry.tied_names}
    loaded: set[str] = set()
    problems: list[str] = []
    for found_name, tensor in weights:
        canonical = stored_name = rename(found_name)
        taken = None if coded is None else coded.take(stored_name, tensor)
        if taken is not None:
            problems += taken
            continue
        if stored_name not in targets and stored_name in tied:
            canonical = tied[stored_name]
            if canonical in loaded:
                continue  # the same weight again, under its other name
        if canonical not in targets:
            held = f"{stored_name.rpartition('.')[0]}.weight" if quantized else stored_name  # scales go with weights
            if not elsewhere & {held, stored_name} and not any(
                fnmatch.fnmatch(stored_name, pattern) for pattern in IGNORED_TENSORS
            ):
                problems.append(f"unexpected {stored_name}")
            continue
        entry, index = targets[canonical]
        expected = stored_shape(entry.layout, len(entry.checkpoint_names), index)
        if tuple(tensor.shape) != expected:
            problems.append(f"{stored_name} is {list(tensor.shape)}, the model has {list(expected)}")
        elif tensor.dtype not in FLOATS:
            problems.append(f"{stored_name} is {short(tensor.dtype)}: codes, of which no scales make a weight here")
        elif canonical in loaded:
            problems.append(f"{stored_name} came twice")
        else:
            _load_one(model, parameters, entry, index, tensor)
        loaded.add(canonical)
    missing = [wanted for wanted in targets if wanted not in loaded] + ([] if coded is None else coded.missing())
    problems.extend(f"missing {wanted}" for wanted in missing)
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(f"the checkpoint does not fit model {name!r}: {'; '.join(problems[:12])}{more}")
    check_finite(parameters, name)
    return set(parameters)


def check_finite(parameters: dict[str, nn.Parameter], name: str) -> None:
    """Raise `CheckpointError` where a loaded weight holds NaN or infinity: answers would be garbage without a word.

    One pass over what this rank holds, on its device. Codes (integers, 8-bit floats) and parameters that vLLM's
    reload has yet to make are passed over.
    """
    found = []
    for parameter_name, parameter in parameters.items():
        if parameter.dtype not in FLOATS or parameter.is_meta or not parameter.numel():
            continue
        low, high = torch.aminmax(parameter.detach())
        if not (low.isfinite() and high.isfinite()):
            count = int((~parameter.detach().isfinite()).sum())
            found.append(f"{parameter_name} ({count} of {parameter.numel()} values)")
    if found:
        more = f"; and {len(found) - 12} more" if len(found) > 12 else ""
        raise CheckpointError(
            f"the checkpoint of model {name!r} holds NaN or infinity in {'; '.join(found[:12])}{more}: it is "
            "damaged, or its training diverged. Serve an earlier checkpoint"
        )


def _load_one(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    entry: WeightEntry,
    index: int,
    tensor: torch.Tensor,
) -> None:
    _call_loader(model, parameters, entry.parameter, len(entry.checkpoint_names), index, tensor)
    for other in entry.tied_parameters:
        # One object at the first load; two after vLLM's reload has replaced them.
        if parameters[other] is not parameters[entry.parameter]:
            _call_loader(model, parameters, other, len(entry.checkpoint_names), index, tensor)


def _call_loader(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    name: str,
    count: int,
    index: int,
    tensor: torch.Tensor,
) -> None:
    parameter = parameters[name]
    loader: Any = parameter.weight_loader  # pyrefly: ignore  # set by vLLM's layers or attach_loaders
    if count == 1:
        loader(parameter, tensor)
        return
    layer = model.get_submodule(name.rpartition(".")[0])
    shard_ids = getattr(layer, "shard_ids", None)
    loader(parameter, tensor, index if shard_ids is None else shard_ids[index])
