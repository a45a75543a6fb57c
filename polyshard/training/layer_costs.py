"""Measured times of a model's layers, by which `polyshard.pipeline_plan` balances pipeline stages."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from polyshard.core.batch import MicroBatch, SumLoss
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.training.train_batch import count_labels, lm_loss_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCosts:
    """Seconds of the forward and backward pass of one micro-batch.

    Attributes:
        layers: of each layer.
        ends: of everything before the first layer, and of everything after the last: head and loss.

    Examples:
        >>> costs = LayerCosts(layers=(1.0, 1.0, 1.0, 1.0), ends=(0.1, 2.0))
        >>> ps.pipeline_plan(4, 2, costs=costs.layers, ends=costs.ends).bounds
        (0, 3, 4)
    """

    layers: tuple[float, ...]
    ends: tuple[float, float]


def measure_layers(
    model: nn.Module,
    micro_batch: MicroBatch,
    parallel_context: ParallelContext,
    loss: SumLoss | None = None,
    *,
    rounds: int = 5,
) -> LayerCosts:
    """Measure the time of each layer of a full model, as medians of several rounds.

    The layers are the items of the model's longest `ModuleList`. Build the model without a pipeline, with the sizes of
    the other axes as in training. Gradients are cleared. If the axes have several ranks, this is a collective, and each
    rank returns its own times: use those of one rank for the plan of all.

    Args:
        model: the full model.
        micro_batch: as in `polyshard.train_batch`.
        parallel_context: the context that the model was built with.
        loss: as in `polyshard.train_batch`.
        rounds: number of rounds, after one that is not counted.

    Raises:
        ConfigurationError: the model has no ModuleList, or is a part of a pipeline, or the micro-batch is no mapping or
            has no labels.

    Examples:
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        ...     def forward(self, x):
        ...         for layer in self.layers:
        ...             x = layer(x)
        ...         return x
        >>> batch = {"x": torch.ones(2, 8, requires_grad=True)}
        >>> costs = measure_layers(Model(), batch, ps.initialize("torch"), lambda output, batch: output.sum())
        >>> len(costs.layers), all(seconds > 0 for seconds in (*costs.layers, *costs.ends))
        (3, True)
    """
    if not isinstance(model, nn.Module) or not isinstance(micro_batch, Mapping):
        raise ConfigurationError(
            f"the arguments of measure_layers are invalid: got {type(model).__name__} and "
            f"{type(micro_batch).__name__}, expected a torch.nn.Module and one micro-batch, a mapping "
            "of the arguments of its forward, and labels."
        )
    if loss is None:
        count_labels(micro_batch)  # raises an error without labels
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists or parallel_context.axis("pipeline").size > 1:
        raise ConfigurationError(
            f"The layers of {type(model).__name__} cannot be measured: it has no ModuleList, or is a part of a "
            "pipeline. Build the full model, with its layers in a ModuleList."
        )
    layers = list(max(lists, key=len))
    device = parallel_context.device
    marks: dict[tuple[str, int], float] = {}
    handles = [handle for i, layer in enumerate(layers) for handle in _watch(layer, partial(_mark, marks, i, device))]
    sum_loss = lm_loss_of(model, parallel_context) if loss is None else loss
    arguments = {name: value for name, value in micro_batch.items() if name != "labels"}
    found: list[list[float]] = []
    try:
        for _ in range(rounds + 1):
            begin = _now(device)
            sum_loss(model(**arguments), micro_batch).backward()
            end = _now(device)
            found.append(_costs(marks, len(layers), begin, end))
            model.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    first, *each, last = (statistics.median(times) for times in zip(*found[1:]))
    return LayerCosts(layers=tuple(each), ends=(first, last))


def _watch(layer: nn.Module, mark: Callable[[str], None]) -> list[Any]:
    return [
        layer.register_forward_pre_hook(lambda *_: mark("forward begins")),
        layer.register_forward_hook(lambda *_: mark("forward ends")),
        layer.register_full_backward_pre_hook(lambda *_: mark("backward begins")),
        layer.register_full_backward_hook(lambda *_: mark("backward ends")),
    ]


def _mark(marks: dict[tuple[str, int], float], index: int, device: torch.device, what: str) -> None:
    marks[what, index] = _now(device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _costs(marks: dict[tuple[str, int], float], count: int, begin: float, end: float) -> list[float]:
    """Return the times of the part before the layers, of each layer, and of the part after them."""
    final = count - 1
    each = [
        marks["forward ends", i] - marks["forward begins", i] + marks["backward ends", i] - marks["backward begins", i]
        for i in range(count)
    ]
    before = marks["forward begins", 0] - begin + end - marks["backward ends", 0]
    after = marks["backward begins", final] - marks["forward ends", final]
    return [before, *each, after]
