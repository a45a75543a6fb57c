"""FairScale's parallel layers behind polyshard's `LinearAdapter`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from polyshard.adapters.shared.token_losses import token_losses
from polyshard.core.context import ParallelContext
from polyshard.layers.head import PaddedHead, padded_size, tied_weight

logger = logging.getLogger(__name__)


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _initial(parallel_context: ParallelContext, std: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the initializer, which FairScale calls on the full weight on every rank before slicing it.

    With equal seeds the weights are therefore equal at every tensor-parallel size.
    """
    return partial(nn.init.normal_, std=std) if parallel_context.initialize_weights else _leave


def _placed(layer: nn.Module, parallel_context: ParallelContext) -> nn.Module:
    """Move a layer to the context's device and the default dtype, which FairScale's constructors do not take."""
    return layer.to(device=parallel_context.device, dtype=torch.get_default_dtype())


class FairscaleLinearAdapter:
    """The `LinearAdapter` of FairScale, whose layers read a global group; see `context.adopt`."""

    plain_outputs = True
    plain_products = True
    vocab_padding = 1
    smooths_labels = False  # FairScale's loss does not support it

    def create_column_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Return FairScale's `ColumnParallelLinear`."""
        from polyshard.adapters.fairscale.compat import ColumnParallelLinear

        initial = _initial(parallel_context, input_size**-0.5)
        layer = ColumnParallelLinear(input_size, output_size, bias=bias, gather_output=False, init_method=initial)
        return _placed(layer, parallel_context)

    def create_row_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Return FairScale's `RowParallelLinear`."""
        from polyshard.adapters.fairscale.compat import RowParallelLinear

        initial = _initial(parallel_context, input_size**-0.5)
        layer = RowParallelLinear(input_size, output_size, bias=bias, input_is_parallel=True, init_method=initial)
        return _placed(layer, parallel_context)

    def create_vocab_embedding(
        self, num_embeddings: int, embedding_dim: int, parallel_context: ParallelContext
    ) -> nn.Module:
        """Return FairScale's `VocabParallelEmbedding`, padded because it asserts that its rows divide evenly."""
        from polyshard.adapters.fairscale.compat import VocabParallelEmbedding

        rows = padded_size(num_embeddings, parallel_context.axis("tensor"))
        layer = VocabParallelEmbedding(rows, embedding_dim, init_method=_initial(parallel_context, 0.02))
        return _placed(layer, parallel_context)

    def create_lm_head(
        self,
        hidden_size: int,
        vocab_size: int,
        parallel_context: ParallelContext,
        bias: bool = False,
        tied_to: nn.Module | None = None,
    ) -> nn.Module:
        """Return FairScale's `ColumnParallelLinear` over the padded vocabulary."""
        axis = parallel_context.axis("tensor")
        layer: Any = self.create_column_parallel(hidden_size, padded_size(vocab_size, axis), parallel_context, bias)
        if tied_to is not None:
            layer.weight = tied_weight(tied_to)
        return PaddedHead(layer, vocab_size, axis)

    def vocab_parallel_cross_entropy(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        parallel_context: ParallelContext,
        *,
        vocab_size: int,
        ignore_index: int,
        label_smoothing: float,
    ) -> torch.Tensor:
        """Return the loss from FairScale's function, wrapped by `token_losses`, since it also computes in bfloat16."""
        assert not label_smoothing, "see smooths_labels"
        from polyshard.adapters.fairscale.compat import vocab_parallel_cross_entropy

        return token_losses(vocab_parallel_cross_entropy, logits, targets, ignore_index=ignore_index)
