"""Which layers of a model a pipeline stage holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import LayoutError


@dataclass(frozen=True, slots=True)
class PipelineStage:
    """One stage, of a model whose layers are cut into runs.

    Attributes:
        layers: indices of its layers in the whole model.
        first: whether it embeds tokens; the others are given hidden states in place of embeddings.
        last: whether it has the last norm and the head; the others give hidden states as they are.
    """

    layers: range
    first: bool
    last: bool


def pipeline_stage(num_layers: int, parallel_context: ParallelContext) -> PipelineStage:
    """The stage of this process: all layers where the pipeline axis has one rank.

    Raises:
        LayoutError: there are fewer layers than stages.
    """
    axis = parallel_context.axis("pipeline")
    if num_layers < axis.size:
        raise LayoutError(f"{num_layers} layers cannot be cut into {axis.size} pipeline stages")
    divide = parallel_context.pipeline_layers or even_stages
    start, stop = divide(num_layers, axis.rank, axis.size)
    return PipelineStage(range(start, stop), first=axis.rank == 0, last=axis.rank == axis.size - 1)


def even_stages(num_layers: int, rank: int, size: int) -> tuple[int, int]:
    """First layer of a stage, and one past its last: as even as can be, the first stages having more."""
    each, more = divmod(num_layers, size)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)


def stage_layers(stage: PipelineStage, make: Callable[[int], nn.Module]) -> nn.ModuleList:
    """The stage's layers, named by their index in the whole model, as a checkpoint names them."""
    layers = nn.ModuleList()
    for index in stage.layers:
        layers.add_module(str(index), make(index))
    return layers
