"""Building pipeline stages with the model's factory, and the check that together they are one model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from polyshard.core.context import GroupContext, ParallelAxis, ParallelContext
from polyshard.core.errors import AdapterError, LayoutError, PolyshardError
from polyshard.core.model_weights import gather_over
from polyshard.core.pipeline_plan import PipelinePlan
from polyshard.core.stages import Stages
from polyshard.core.weight_table import collect_layouts

_INDEX = re.compile(r"^(.*?)\.(\d+)\.")  # the first index in a name: `model.layers.3.mlp.up.weight`


def build_stages(
    factory: Callable[[Any, ParallelContext], nn.Module],
    config: Any,
    parallel_context: ParallelContext,
    plan: PipelinePlan | None = None,
    *,
    shared: Sequence[str] = (),
) -> Stages:
    """Build this rank's pipeline stages: the factory is called once for each, with a context of that stage.

    The factory is the one that serves the model in vLLM's pipelines: it builds the layers of
    `polyshard.pipeline_stage`, and its model takes `inputs_embeds`, the output of the stage before. On one pipeline
    rank, the result is the full model. This is a collective over the pipeline axis.

    Args:
        factory: the model factory.
        config: its first argument.
        parallel_context: the context of this rank.
        plan: the division of layers, and the schedule; by default even, with `"1f1b"`.
        shared: patterns of weights that several stages hold although no stage uses them twice. A weight that a stage
            ties (an embedding and a head) needs none.

    Raises:
        LayoutError: the stages together are not one model: layers are missing or doubled, every stage is the full
            model, or weights of one name differ. Or the plan does not fit the context or the model.
        AdapterError: the factory raised an error on another rank, or the context is not a `GroupContext`.

    Examples:
        >>> context = ps.initialize("torch")
        >>> def build_model(config, context):
        ...     stage = ps.pipeline_stage(config["layers"], context)
        ...     return torch.nn.ModuleDict({"layers": ps.stage_layers(stage, lambda i: torch.nn.Linear(2, 2))})
        >>> stages = build_stages(build_model, {"layers": 2}, context)
        >>> [name for name, _ in stages.named_parameters()]
        ['layers.0.weight', 'layers.0.bias', 'layers.1.weight', 'layers.1.bias']
    """
    axis = parallel_context.axis("pipeline")
    plan = plan or PipelinePlan(schedule="1f1b", bounds=(), placement=tuple(range(axis.size)))
    if plan.ranks != axis.size:
        raise LayoutError(
            f"The pipeline plan does not fit the context: got a plan for {plan.ranks} pipeline ranks, expected "
            f"{axis.size}. Pass context.layout.pipeline to pipeline_plan."
        )
    divided: set[int] = set()
    error: Exception | None = None
    stages: Stages | None = None
    parts: dict[int, dict[str, _Held]] = {}
    try:
        numbers = plan.stages_of(axis.rank)
        modules = [_build(factory, config, _context_of(parallel_context, plan, n, divided), n) for n in numbers]
        parts = {number: _held(module) for number, module in zip(numbers, modules)}
        stages = Stages(modules, numbers, plan)
    except Exception as problem:
        error = problem
    with parallel_context.guard("pipeline build"):
        told = None if error is None else f"{type(error).__name__}: {error}"
        gathered = gather_over(axis, (told, parts, sorted(divided)))
    failed = [f"rank {axis.ranks[i]}: {text}" for i, (text, _, _) in enumerate(gathered) if text is not None]
    if error is not None and (len(failed) == 1 or isinstance(error, PolyshardError)):
        raise error
    if failed:
        raise AdapterError(f"The factory cannot build its pipeline stages: {'; '.join(failed)}") from error
    counts = {count for _, _, found in gathered for count in found}
    _check_union([part for _, part, _ in gathered], plan, counts, shared)
    assert stages is not None
    return stages


def as_stages(model: nn.Module, parallel_context: ParallelContext) -> Stages:
    """Return the stages of a model: `model` itself, or the one that its factory built with `parallel_context`.

    A collective over the pipeline axis for a model that `build_stages` did not make, which is checked in the same way.

    Raises:
        LayoutError: the stages together are not one model; see `build_stages`.
    """
    axis = parallel_context.axis("pipeline")
    if isinstance(model, Stages):
        return model
    plan = PipelinePlan(schedule="1f1b", bounds=(), placement=tuple(range(axis.size)))
    with parallel_context.guard("pipeline build"):
        gathered = gather_over(axis, {axis.rank: _held(model)})
    _check_union(gathered, plan, set(), ())
    return Stages([model], (axis.rank,), plan)


@dataclasses.dataclass(frozen=True, slots=True)
class _Held:
    """A weight of a stage: its logical shape, dtype, and whether the stage uses it in two places."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    tied: bool


def _held(module: nn.Module) -> dict[str, _Held]:
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    return {
        name: _Held(entry.layout.shape, dtypes[name], bool(entry.tied_names))
        for name, entry in collect_layouts(module).items()
    }  # fmt: skip


def _build(factory: Callable[..., Any], config: Any, context: ParallelContext, number: int) -> nn.Module:
    model = factory(config, context)
    if not isinstance(model, nn.Module):
        raise AdapterError(
            f"The factory returned the wrong type for stage {number}: got {type(model).__name__}, expected a "
            "torch.nn.Module."
        )
    return model


def _context_of(context: ParallelContext, plan: PipelinePlan, number: int, divided: set[int]) -> ParallelContext:
    """Return the context with which the factory builds a stage; `divided` gets the numbers of layers it asks for."""
    axis = context.axis("pipeline")
    if plan.num_stages == 1:
        return context
    if not isinstance(context, GroupContext):
        raise AdapterError(
            f"Pipeline stages cannot be built with a {type(context).__name__}. Pass a polyshard.GroupContext."
        )

    def divide(num_layers: int, stage: int, num_stages: int) -> tuple[int, int]:
        divided.add(num_layers)
        return plan.divide(num_layers, stage, num_stages)

    ranks = tuple(axis.ranks[holder] for holder in plan.placement)
    of_stage = ParallelAxis(name="pipeline", ranks=ranks, rank=number)
    return dataclasses.replace(context, axes={**context.axes, "pipeline": of_stage}, pipeline_layers=divide)


def _check_union(
    of_ranks: Sequence[Mapping[int, Mapping[str, _Held]]], plan: PipelinePlan, counts: set[int], shared: Sequence[str]
) -> None:
    """Raise `LayoutError` unless the stages of all ranks together are one model."""
    everywhere = {number: part for of_rank in of_ranks for number, part in of_rank.items()}
    stages = [everywhere[number] for number in range(plan.num_stages)]
    if len(stages) == 1:
        return
    advice = (
        "Build only the layers of polyshard.pipeline_stage(num_layers, parallel_context) in each stage, the embedding "
        "in the first and the norm and head in the last, as docs/how-to/bring-a-model.md shows."
    )
    if all(part.keys() == stages[0].keys() for part in stages):
        raise LayoutError(f"The factory built the full model in each of {len(stages)} pipeline stages. {advice}")
    holders: dict[str, list[int]] = {}
    for number, part in enumerate(stages):
        for name in part:
            holders.setdefault(name, []).append(number)
    for name, numbers in holders.items():
        found = {(stages[n][name].shape, stages[n][name].dtype) for n in numbers}
        if len(found) > 1:
            raise LayoutError(f"The weight {name} differs between stages {numbers}: got {sorted(map(str, found))}.")
        tied = any(stages[n][name].tied for n in numbers) or any(fnmatchcase(name, pattern) for pattern in shared)
        if len(numbers) > 1 and not tied:
            raise LayoutError(
                f"The weight {name} is in pipeline stages {', '.join(map(str, numbers))}, and none of them ties it to "
                f"another weight. {advice} If the stages do share it, pass shared=({name!r},)."
            )
    indices: dict[str, set[int]] = {}
    for name in holders:
        found_index = _INDEX.match(name)
        if found_index:
            indices.setdefault(found_index[1], set()).add(int(found_index[2]))
    for prefix, found_indices in indices.items():
        missing = sorted(set(range(max(found_indices) + 1)) - found_indices)
        if missing:
            raise LayoutError(f"No pipeline stage has {prefix}.{missing[0]} ({len(missing)} missing). {advice}")
    if len(counts) > 1:
        raise LayoutError(f"Pipeline stages divide different numbers of layers: got {sorted(counts)}, expected one.")
    if indices and counts and max(map(len, indices.values())) < max(counts):
        longest = max(indices, key=lambda prefix: len(indices[prefix]))
        raise LayoutError(
            f"Layers are missing: the pipeline stages have {len(indices[longest])} of {max(counts)} in {longest}. "
            f"{advice}"
        )
