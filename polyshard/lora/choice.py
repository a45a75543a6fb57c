"""Which layers of a model get low-rank matrices, agreed on by all pipeline stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.model_weights import gather_over
from polyshard.core.weight_sharding import WeightLayout
from polyshard.core.weight_table import WeightTable, layer_paths
from polyshard.lora.config import ALL_LINEAR, check_patterns, matcher, rank_and_scale
from polyshard.lora.layer import LoraPart, lora_part

logger = logging.getLogger(__name__)

_SHOWN = 4  # of the modules that a warning names


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layer that a config may target.

    Attributes:
        path: of the layer in the model.
        layout: of its weight.
        names: of its projections in a checkpoint.
        is_vocabulary: whether it is an embedding or an output projection.
        are_experts: whether its weight holds the experts of a layer, which get no matrices.
    """

    path: str
    layout: WeightLayout
    names: tuple[str, ...]
    is_vocabulary: bool = False
    are_experts: bool = False


Chosen = dict[str, tuple[WeightLayout, list[LoraPart]]]  # by the path of the layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The layers that a config targets.

    Attributes:
        stages: the layers of each stage of this rank.
        parameters: names of the matrices of all stages in the built model.
        projections: names of the projections of all stages in a checkpoint.
        other_names: whether a target is not a name of a checkpoint.
    """

    stages: Sequence[Chosen]
    parameters: frozenset[str]
    projections: frozenset[str]
    other_names: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfStage:
    """What the other ranks need to know of one stage."""

    parameters: frozenset[str]
    projections: frozenset[str]
    addressed: frozenset[str]
    known: frozenset[str]
    other_names: bool
    experts: frozenset[tuple[str, str]]  # the layer and the projection of targeted experts


def matrix_name(path: str, kind: str, part: LoraPart) -> str:
    """Return the name of a matrix in the built model; `kind` is `lora_A` or `lora_B`."""
    return f"{path}.{kind}.{part.key}.weight"


def choose(config: Any, stages: Callable[[], Sequence[list[Candidate]]], context: ParallelContext) -> Choice:
    """Return the layers that a config targets. A collective over the pipeline axis.

    Args:
        config: a `peft.LoraConfig`.
        stages: returns the linear layers of each stage of this rank.
        context: the parallel context.

    Raises:
        ConfigurationError: a target is unsupported or does not exist, or a pipeline stage has none.
    """
    axis = context.axis("pipeline")
    mine: list[tuple[Chosen, _OfStage]] = []
    error: ConfigurationError | None = None
    try:
        mine = [_choose(config, layers, context) for layers in stages()]
    except ConfigurationError as problem:
        error = problem
    with context.guard("pipeline LoRA"):
        gathered = gather_over(axis, (None if error is None else str(error), [of_stage for _, of_stage in mine]))
    if error is not None:
        raise error
    for rank, (told, _) in zip(axis.ranks, gathered):
        if told is not None:
            raise ConfigurationError(f"rank {rank}: {told}")
    everywhere = [of_stage for _, of_rank in gathered for of_stage in of_rank]
    experts = sorted(set().union(*(of_stage.experts for of_stage in everywhere)))
    addressed = set().union(*(of_stage.addressed for of_stage in everywhere))
    _check_experts(config, addressed, experts)
    if not any(of_stage.projections for of_stage in everywhere):
        known = sorted(set().union(*(of_stage.known for of_stage in everywhere)))
        raise ConfigurationError(
            f"LoraConfig.target_modules matches no linear layer: got {config.target_modules!r}, expected names among "
            f"{', '.join(known)}."
        )
    check_patterns(config, addressed)
    empty = [rank for rank, (_, parts) in zip(axis.ranks, gathered) if not any(part.projections for part in parts)]
    if empty:
        raise ConfigurationError(
            f"LoraConfig targets no layer of the pipeline stages on rank {empty[0]}, which would train nothing: got "
            f"{config.target_modules!r}. Target a layer in each rank's stages, or use fewer pipeline ranks."
        )
    if experts:
        _warn_of_experts(experts)
    return Choice(
        stages=[chosen for chosen, _ in mine],
        parameters=frozenset().union(*(of_stage.parameters for of_stage in everywhere)),
        projections=frozenset().union(*(of_stage.projections for of_stage in everywhere)),
        other_names=any(of_stage.other_names for of_stage in everywhere),
    )


def _check_experts(config: Any, addressed: Iterable[str], experts: Iterable[tuple[str, str]]) -> None:
    """Raise `ConfigurationError` if a target is a projection of experts only."""
    if isinstance(config.target_modules, str):
        wanted = () if addressed else tuple(name for _, name in experts)[:1]
    else:
        of_experts = {name for _, name in experts}
        wanted = sorted(t for t in config.target_modules if t in of_experts and not _named(t, addressed))
    if wanted:
        raise ConfigurationError(
            f"LoRA on the experts of a layer is unsupported: got target {wanted[0]!r}, expected projections of other "
            "layers. Leave it out of target_modules."
        )


def _named(target: str, names: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _warn_of_experts(experts: Sequence[tuple[str, str]]) -> None:
    layers = sorted({layer for layer, _ in experts})
    more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
    logger.warning(
        "LoraConfig targets %s of experts, which get no adapter and stay frozen, because LoRA on experts is "
        "unsupported: %s%s",
        ", ".join(sorted({name for _, name in experts})),
        ", ".join(layers[:_SHOWN]),
        more,
    )


def candidates(model: nn.Module, table: WeightTable) -> list[Candidate]:
    """Return the linear layers of a model, with the embedding, the output projection and experts."""
    paths = layer_paths(model)
    found: list[Candidate] = []
    for entry in table.values():
        layer, _, leaf = entry.name.rpartition(".")
        if entry.layout.experts is not None:
            if not leaf.endswith("bias"):
                names = tuple(name.removesuffix(".weight") for name in entry.checkpoint_names)
                path = layer if leaf == "weight" else entry.name
                found.append(Candidate(path=path, layout=entry.layout, names=names, are_experts=True))
            continue
        path = paths.get(entry.parameter)
        if path is None and isinstance(model.get_submodule(entry.parameter.rpartition(".")[0]), nn.Linear):
            path = layer
        if leaf != "weight" or len(entry.layout.shape) != 2 or not path:
            continue
        stored = entry.checkpoint_names
        found.append(
            Candidate(
                path=path,
                layout=entry.layout,
                names=tuple(name.rpartition(".")[0] for name in stored),
                is_vocabulary=any(segment.pad_multiple for segment in entry.layout.segments),
            )
        )
    return found


def _choose(config: Any, layers: list[Candidate], context: ParallelContext) -> tuple[Chosen, _OfStage]:
    """Return the layers of one stage that a config targets."""
    is_target, everything = matcher(config), config.target_modules == ALL_LINEAR
    chosen: Chosen = {}
    addressed: set[str] = set()
    other_names = False
    experts: set[tuple[str, str]] = set()
    for layer in layers:
        if layer.are_experts:
            module, _, own = layer.path.rpartition(".")
            targeted = {name.rpartition(".")[2] for name in layer.names if is_target(name)}
            experts |= {(module, name) for name in targeted or ({own} if is_target(layer.path) else ())}
            continue
        whole = is_target(layer.path)
        indices = [index for index, name in enumerate(layer.names) if whole or is_target(name)]
        if not indices or (layer.is_vocabulary and everything):
            continue
        if layer.is_vocabulary:
            raise ConfigurationError(
                f"LoRA on an embedding or an output projection is unsupported: got target {layer.names[0]!r}. vLLM "
                "serves no such adapter on a registered model. Leave it out of target_modules."
            )
        if layer.layout.dim is None and context.layout.sequence_parallel and context.axis("tensor").size > 1:
            raise ConfigurationError(
                f"LoRA on a layer that is replicated over the tensor axis is unsupported under sequence parallel: got "
                f"target {layer.names[0]!r}. Leave it out of target_modules."
            )
        other_names |= any(not is_target(layer.names[index]) for index in indices)
        addressed.update((layer.path, *(layer.names[index] for index in indices)))
        parts = [
            lora_part(layer.names[index], index, layer.layout, *rank_and_scale(config, layer.names[index]))
            for index in indices
        ]
        chosen[layer.path] = (layer.layout, parts)
    of_stage = _OfStage(
        parameters=frozenset(
            matrix_name(path, kind, part)
            for path, (_, parts) in chosen.items()
            for part in parts
            for kind in ("lora_A", "lora_B")
        ),
        projections=frozenset(part.name for _, parts in chosen.values() for part in parts),
        addressed=frozenset(addressed),
        known=frozenset(name.rpartition(".")[2] for layer in layers if not layer.are_experts for name in layer.names),
        other_names=other_names,
        experts=frozenset(experts),
    )
    return chosen, of_stage
