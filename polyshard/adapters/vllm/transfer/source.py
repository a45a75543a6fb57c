"""The trainer's weights as a `WeightSource` of vLLM's own weight transfer: for its nccl and ipc backends on GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from polyshard.adapters.vllm.compat import ParamMeta, WeightSource, source_metadata
from polyshard.core.context import ParallelContext
from polyshard.core.weight_table import stored_parts, stored_shape
from polyshard.weights.gather import gather_shards
from polyshard.weights.view import view_weights


class LayoutSource(WeightSource):
    """Names and whole tensors as a Hugging Face checkpoint would hold them, one parameter gathered at a time.

    Every trainer rank iterates it to the end: gathering is a collective.

    Args:
        model: a model as its factory built it, or a training engine around one.
        parallel_context: the context that the model was built with.
        dtype: of the engine; default as the trainer's.
    """

    def __init__(
        self, model: nn.Module | Any, parallel_context: ParallelContext, dtype: torch.dtype | None = None
    ) -> None:
        self._view = view_weights(model, parallel_context)
        self._axis = parallel_context.axis("tensor")
        self._dtype = dtype
        self._dtypes = {name: dtype or parameter.dtype for name, parameter in self._view.module.named_parameters()}

    @source_metadata
    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and shape of all that iteration yields, in its order; nothing is transferred."""
        return [
            ParamMeta(name, self._dtypes[entry.parameter], stored_shape(entry.layout, len(entry.checkpoint_names), i))
            for entry in self._view.table.values()
            for i, name in enumerate(entry.checkpoint_names)
        ]

    def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each name with its whole tensor, as vLLM 0.33 asks for them."""
        return iter(self)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shard in self._view.shards():
            entry = self._view.table[name]
            full = gather_shards(shard.to(self._dtypes[name]), entry.layout, self._axis)
            yield from zip(entry.checkpoint_names, stored_parts(entry.layout, len(entry.checkpoint_names), full))
