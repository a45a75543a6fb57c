"""Loading weights from vLLM's loader into a served model, according to the weight layouts.

Data reaches a parameter only through its `weight_loader`, which is looked up at load time. vLLM's reload replaces the
parameters, and would silently lose a direct copy.
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
from polyshard.core.weight_sharding import WeightLayout
from polyshard.core.weight_table import IGNORED_TENSORS, WeightEntry, WeightTable, copy_into_shard, stored_shape


def shard_loader(layout: WeightLayout, count: int, rank: int, size: int) -> Callable[..., None]:
    """Return the `weight_loader` of a parameter whose layer has none; it copies this rank's shard.

    Its first argument must be called `param`, because vLLM's reload inspects the signature and rebinds that argument.
    """

    def load(param: torch.Tensor, loaded_weight: torch.Tensor, index: int = 0) -> None:
        copy_into_shard(param, layout, count, index, loaded_weight, rank, size)

    return load


def attach_loaders(model: nn.Module, table: WeightTable, context: ParallelContext) -> None:
    """Set a `shard_loader` on every parameter that has no loader."""
    rank, size = context.get_tensor_parallel_rank(), context.get_tensor_parallel_world_size()
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "weight_loader"):
            entry = table[name]
            loader = shard_loader(entry.layout, len(entry.checkpoint_names), rank, size)
            parameter.weight_loader = loader  # pyrefly: ignore  # vLLM's own convention


def packed_names(table: WeightTable, name: str) -> dict[str, list[str]]:
    """Return the projections that each fused layer has in a checkpoint, by layer name, as vLLM's LoRA needs them.

    Raises:
        RegistrationError: layers of the same name are fused from differently named projections.
    """
    projections: dict[str, list[str]] = {}
    for entry in table.values():
        layer, _, kind = entry.parameter.rpartition(".")
        if kind != "weight" or len(entry.checkpoint_names) == 1:
            continue
        fused = layer.rpartition(".")[2]
        parts = [stored.split(".")[-2] for stored in entry.checkpoint_names]
        if projections.setdefault(fused, parts) != parts:
            raise RegistrationError(
                f"model {name!r}: layers called {fused!r} are fused from {projections[fused]} and from {parts}, but "
                "vLLM identifies fused layers by name. Give them different names"
            )
    return projections


def keep_buffers(model: nn.Module) -> None:
    """Make every buffer non-persistent, since vLLM's reload silently leaves persistent buffers uninitialized.

    Checkpoints contain no buffers: loading fills only parameters.
    """
    for module in model.modules():
        module._non_persistent_buffers_set.update(module._buffers)


def load_weights(
    model: nn.Module,
    table: WeightTable,
    weights: Iterable[tuple[str, torch.Tensor]],
    name: str,
    rename: Callable[[str], str],
    other_stages: frozenset[str],
    quantized: QuantizedLayers | None = None,
) -> set[str]:
    """Load each parameter exactly once.

    Args:
        model: the model that the factory built.
        table: its weight layouts.
        weights: stored names with full tensors.
        name: the architecture, for messages.
        rename: maps a stored name to the name in the model.
        other_stages: names of the weights on other pipeline stages.
        quantized: layers that load codes and scales instead of weights.

    Returns:
        The names of the loaded parameters in the model, that is, of all parameters.

    Raises:
        CheckpointError: tensors are missing, unexpected, duplicated, of the wrong shape, or not finite. The message
            lists them.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets = table.by_checkpoint_name()
    coded = None
    if quantized is not None:
        coded = QuantizedLoading(quantized.parts)
        targets = {n: target for n, target in targets.items() if target[0].parameter not in quantized.weights}
    tied = {other: entry.checkpoint_names[0] for entry in table.values() for other in entry.tied_names}
    loaded: set[str] = set()
    problems: list[str] = []
    for checkpoint_name, tensor in weights:
        canonical = stored_name = rename(checkpoint_name)
        quantized_problems = None if coded is None else coded.load(stored_name, tensor)
        if quantized_problems is not None:
            problems += quantized_problems
            continue
        if stored_name not in targets and stored_name in tied:
            canonical = tied[stored_name]
            if canonical in loaded:
                continue  # a duplicate of the tied weight
        if canonical not in targets:
            held = f"{stored_name.rpartition('.')[0]}.weight" if quantized else stored_name  # scales go with weights
            if not other_stages & {held, stored_name} and not any(
                fnmatch.fnmatch(stored_name, pattern) for pattern in IGNORED_TENSORS
            ):
                problems.append(f"unexpected {stored_name}")
            continue
        entry, index = targets[canonical]
        expected = stored_shape(entry.layout, len(entry.checkpoint_names), index)
        if tuple(tensor.shape) != expected:
            problems.append(f"{stored_name} has the wrong shape: got {list(tensor.shape)}, expected {list(expected)}")
        elif tensor.dtype not in FLOATS:
            problems.append(f"{stored_name} is {short(tensor.dtype)}: quantized codes without a supported scheme")
        elif canonical in loaded:
            problems.append(f"duplicate {stored_name}")
        else:
            _load_one(model, parameters, entry, index, tensor)
        loaded.add(canonical)
    missing = [target for target in targets if target not in loaded] + ([] if coded is None else coded.missing())
    problems.extend(f"missing {target}" for target in missing)
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(f"the checkpoint does not fit model {name!r}: {'; '.join(problems[:12])}{more}")
    check_finite(parameters, name)
    return set(parameters)


def check_finite(parameters: dict[str, nn.Parameter], name: str) -> None:
    """Raise `CheckpointError` if a loaded weight holds NaN or infinity, which would silently give garbage answers.

    It reads this rank's parameters once, on their device. Codes (integers, 8-bit floats) and parameters that vLLM's
    reload has not created yet are skipped.
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
            f"the checkpoint of model {name!r} holds NaN or infinity in {'; '.join(found[:12])}{more}. It is "
            "damaged, or its training diverged: serve an earlier checkpoint"
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
        # One object at the first load, but two objects after vLLM's reload.
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
