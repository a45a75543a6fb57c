"""Megatron-Core's parallel layers behind polyshard's `LinearAdapter`."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polyshard.adapters.shared.token_losses import token_losses
from polyshard.core.context import ParallelAxis, ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.errors import AdapterError, ConfigurationError
from polyshard.core.experts import ExpertBank
from polyshard.layers.head import PaddedHead, padded_size, tied_weight

if TYPE_CHECKING:
    from polyshard.adapters.megatron.experts_compat import TokenDispatcher

logger = logging.getLogger(__name__)


class MegatronLayer(nn.Module):
    """A Megatron layer that returns a plain tensor, with the sequence dimension before the last.

    Under sequence parallel Megatron shards dimension 0, `[seq, batch, hidden]`; polyshard's tensors are
    `[batch, seq, hidden]` or packed `[tokens, hidden]`.
    """

    def __init__(self, layer: nn.Module, sequence_parallel: bool) -> None:
        super().__init__()
        self.layer = layer
        self.sequence_parallel = sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of Megatron's layer, without its bias tuple."""
        if not (self.sequence_parallel and x.dim() == 3):
            return self.layer(x.contiguous())[0]
        return self.layer(x.transpose(0, 1).contiguous())[0].transpose(0, 1)


class MegatronEmbedding(nn.Module):
    """A Megatron embedding with the same dimension order as `MegatronLayer`."""

    def __init__(self, layer: nn.Module, sequence_parallel: bool) -> None:
        super().__init__()
        self.layer = layer
        self.sequence_parallel = sequence_parallel

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of token IDs `[batch, seq]` or `[tokens]`."""
        if not self.sequence_parallel:
            return self.layer(input_ids)
        if input_ids.dim() == 1:
            return self.layer(input_ids.unsqueeze(0)).squeeze(1)
        return self.layer(input_ids).transpose(0, 1)


class MegatronLinearAdapter:
    """The `LinearAdapter` of Megatron-Core, with an explicit tensor-parallel group.

    Args:
        token_dispatcher: how Megatron's experts exchange tokens: `"alltoall"`, or `"allgather"`, which sends every
            token to every rank of the expert axis.

    Raises:
        ConfigurationError: the dispatcher is unknown or unsupported.
    """

    plain_outputs = True
    plain_products = True
    vocab_padding = 1
    smooths_labels = False  # Megatron smooths over each rank's shard only

    def __init__(self, token_dispatcher: TokenDispatcher = "alltoall") -> None:
        if token_dispatcher not in ("alltoall", "allgather"):
            raise ConfigurationError(
                f"The token dispatcher is unsupported: got {token_dispatcher!r}, expected 'alltoall' or 'allgather'. "
                "Megatron's 'flex' requires DeepEP."
            )
        self.token_dispatcher: TokenDispatcher = token_dispatcher

    def create_column_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Return Megatron's `ColumnParallelLinear`."""
        return MegatronLayer(*self._column(input_size, output_size, parallel_context, bias, input_size**-0.5))

    def create_row_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Return Megatron's `RowParallelLinear`."""
        from polyshard.adapters.megatron.compat import RowParallelLinear

        config, group = _config(parallel_context), parallel_context.get_tensor_parallel_group()
        layer: Any = RowParallelLinear(
            input_size,
            output_size,
            config=config,
            init_method=partial(nn.init.normal_, std=input_size**-0.5),
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=group,
        ).to(parallel_context.device)
        if bias and config.sequence_parallel:
            # Each rank adds the bias to its own tokens; Megatron leaves summing the gradients to the engine.
            layer.bias.register_hook(partial(_sum, axis=parallel_context.axis("tensor")))
        return MegatronLayer(layer, config.sequence_parallel)

    def create_vocab_embedding(
        self, num_embeddings: int, embedding_dim: int, parallel_context: ParallelContext
    ) -> nn.Module:
        """Return Megatron's `VocabParallelEmbedding`, padded because it asserts that its rows divide evenly."""
        from polyshard.adapters.megatron.compat import VocabParallelEmbedding

        config, axis = _config(parallel_context), parallel_context.axis("tensor")
        layer = VocabParallelEmbedding(
            padded_size(num_embeddings, axis),
            embedding_dim,
            init_method=partial(nn.init.normal_, std=0.02),
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=parallel_context.get_tensor_parallel_group(),
        )
        return MegatronEmbedding(layer.to(parallel_context.device), config.sequence_parallel)

    def create_lm_head(
        self,
        hidden_size: int,
        vocab_size: int,
        parallel_context: ParallelContext,
        bias: bool = False,
        tied_to: nn.Module | None = None,
    ) -> nn.Module:
        """Return Megatron's `ColumnParallelLinear` over the padded vocabulary."""
        axis = parallel_context.axis("tensor")
        layer, sequence_parallel = self._column(
            hidden_size, padded_size(vocab_size, axis), parallel_context, bias, 0.02
        )
        if tied_to is not None:
            layer.weight = tied_weight(tied_to)
        return PaddedHead(MegatronLayer(layer, sequence_parallel), vocab_size, axis)

    def create_experts(self, bank: ExpertBank, parallel_context: ParallelContext) -> nn.Module:
        """Return Megatron's experts with its token dispatcher; torch's for experts that Megatron lacks.

        Raises:
            AdapterError: the context is of another adapter.
        """
        reason = _lacks(bank, parallel_context)
        if reason is not None:
            logger.info("torch's experts are used, not Megatron's: %s", reason)
            return load_adapter("torch").linear.create_experts(bank, parallel_context)
        from polyshard.adapters.megatron.experts import MegatronExperts

        # torch's contexts have no group on axes of one rank; neither has the pipeline axis of a Megatron stage.
        own = isinstance(parallel_context.linear, MegatronLinearAdapter)
        expert, pipeline = (parallel_context.axis(name).group for name in ("expert", "pipeline"))
        if expert is None or (pipeline is None and not own):
            raise AdapterError(
                "Megatron's experts need the process groups of the Megatron adapter: got a context of another one. Use "
                "polyshard.initialize('megatron', ...), and pass linear= for the layers of other libraries."
            )
        return MegatronExperts(bank, parallel_context, self.token_dispatcher)

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
        """Return the loss from Megatron's function, wrapped by `token_losses`."""
        assert not label_smoothing, "see smooths_labels"
        from polyshard.adapters.megatron.compat import vocab_parallel_cross_entropy

        group = parallel_context.get_tensor_parallel_group()
        assert group is not None, "contexts of this adapter have a group on every axis"
        return token_losses(
            partial(vocab_parallel_cross_entropy, group=group), logits, targets, ignore_index=ignore_index
        )

    def _column(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool, std: float
    ) -> tuple[Any, bool]:
        from polyshard.adapters.megatron.compat import ColumnParallelLinear

        config = _config(parallel_context)
        layer = ColumnParallelLinear(
            input_size,
            output_size,
            config=config,
            init_method=partial(nn.init.normal_, std=std),
            bias=bias,
            gather_output=False,
            tp_group=parallel_context.get_tensor_parallel_group(),
        )
        return layer.to(parallel_context.device), config.sequence_parallel


def _lacks(bank: ExpertBank, context: ParallelContext) -> str | None:
    """Return why Megatron's experts cannot compute a bank; None if they can."""
    if context.exact is not None:
        return "exact mode replaces the matrix products of torch's"
    if bank.activation != "silu" or bank.bias:
        return "polyshard builds Megatron's for SwiGLU without biases only"
    if bank.storage.stacked is not None:
        return "Megatron's weights are stored expert by expert"
    if bank.scale_input:
        return "Megatron scales inputs of one expert per token only"
    return None


def _config(parallel_context: ParallelContext) -> Any:
    from polyshard.adapters.megatron.compat import layer_config

    return layer_config(
        parallel_context.get_tensor_parallel_world_size(),
        parallel_context.layout.sequence_parallel,
        parallel_context.initialize_weights,
    )


def _sum(gradient: torch.Tensor, axis: ParallelAxis) -> torch.Tensor:
    assert axis.collectives is not None
    return axis.collectives.all_reduce(gradient)
