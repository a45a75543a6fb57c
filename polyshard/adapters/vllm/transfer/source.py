"""The trainer's weights as a `WeightSource` for vLLM's own weight transfer (its nccl and ipc backends on GPUs)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from polyshard.adapters.vllm.compat import ParamMeta, WeightSource, source_metadata
from polyshard.core.context import ParallelContext
from polyshard.core.weight_table import stored_parts, stored_shape
from polyshard.weights.gather import gather_shards
from polyshard.weights.view import view_weights


class LayoutSource(WeightSource):
    """Names and full tensors as in a Hugging Face checkpoint, gathered one parameter at a time.

    Every trainer rank must iterate it to the end, because gathering is a collective.

    Args:
        model: a model that its factory built, or a training engine around one.
        parallel_context: the context that the model was built with.
        dtype: dtype of the engine; by default the parameters' own.

    Examples:
        >>> context = ps.initialize("torch")
        >>> layer = ps.column_parallel(4, 2, context)
        >>> [(name, tensor.shape, tensor.dtype) for name, tensor in LayoutSource(layer, context, torch.bfloat16)]
        [('weight', torch.Size([2, 4]), torch.bfloat16)]
    """

    def __init__(
        self, model: nn.Module | Any, parallel_context: ParallelContext, dtype: torch.dtype | None = None
    ) -> None:
        self._view = view_weights(model, parallel_context)
        self._context = parallel_context
        self._axes = parallel_context.axis("tensor"), parallel_context.axis("expert")
        self._dtypes = {name: dtype or found for name, found in self._view.dtypes.items()}

    @source_metadata
    def metadata(self) -> list[ParamMeta]:
        """Return the name, dtype and shape of each tensor, in iteration order, without transferring it."""
        return [
            ParamMeta(name, self._dtypes[entry.parameter], stored_shape(entry.layout, len(entry.checkpoint_names), i))
            for entry in self._view.table.values()
            for i, name in enumerate(entry.checkpoint_names)
        ]

    def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return an iterator over names and full tensors, the interface of vLLM 0.33."""
        return iter(self)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, full in self._full():
            entry = self._view.table[name]
            yield from zip(entry.checkpoint_names, stored_parts(entry.layout, len(entry.checkpoint_names), full))

    def _full(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the full tensors of all pipeline stages; their owners broadcast them to the other stages."""
        view, stages = self._view, self._context.axis("pipeline")
        shards = iter(view.shards())
        for name, entry in view.table.items():
            if view.owners[name] == stages.rank:
                shard = next(shard for found, shard in shards if found == name)
                full = gather_shards(shard.to(self._dtypes[name]), entry.layout, *self._axes)
            else:
                full = torch.empty(entry.layout.shape, dtype=self._dtypes[name], device=self._context.device)
            if stages.size > 1:
                full = full.contiguous()
                with self._context.guard("pipeline broadcast of weights"):
                    dist.broadcast(full, src=stages.ranks[view.owners[name]], group=stages.group)
            yield name, full
        for _ in shards:  # copies of weights that another stage owns: gathering them is a collective, too
            pass
