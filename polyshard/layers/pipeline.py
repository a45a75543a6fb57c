"""Distribution of a model's layers over pipeline stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import LayoutError
from polyshard.core.pipeline_plan import even_stages


@dataclass(frozen=True, slots=True)
class PipelineStage:
    """One pipeline stage, a contiguous run of a model's layers.

    Attributes:
        layers: indices of its layers in the full model.
        first: whether it embeds tokens; other stages receive hidden states in place of embeddings.
        last: whether it has the final norm and the head; other stages return hidden states.

    Examples:
        >>> PipelineStage(range(0, 2), first=True, last=False).layers
        range(0, 2)
    """

    layers: range
    first: bool
    last: bool


def pipeline_stage(num_layers: int, parallel_context: ParallelContext) -> PipelineStage:
    """Return the stage of this process; it has all layers if the pipeline axis has one rank.

    Raises:
        LayoutError: there are fewer layers than stages.

    Examples:
        >>> ps.pipeline_stage(4, ps.initialize("torch"))
        PipelineStage(layers=range(0, 4), first=True, last=True)
    """
    axis = parallel_context.axis("pipeline")
    if num_layers < axis.size:
        raise LayoutError(f"{num_layers} layers cannot be divided into {axis.size} pipeline stages")
    divide = parallel_context.pipeline_layers or even_stages
    start, stop = divide(num_layers, axis.rank, axis.size)
    return PipelineStage(range(start, stop), first=axis.rank == 0, last=axis.rank == axis.size - 1)


def stage_layers(stage: PipelineStage, make: Callable[[int], nn.Module]) -> nn.ModuleList:
    """Create the layers of a stage, named by their index in the full model as in a checkpoint.

    Examples:
        >>> stage = ps.pipeline_stage(2, ps.initialize("torch"))
        >>> list(ps.stage_layers(stage, lambda index: torch.nn.Linear(2, 2)).state_dict())
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    layers = nn.ModuleList()
    for index in stage.layers:
        layers.add_module(str(index), make(index))
    return layers
