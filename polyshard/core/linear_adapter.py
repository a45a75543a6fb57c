"""Parallel layers as functions of a context: the only way a model asks for one, whatever library builds it.

`LinearAdapter` is the protocol that a library's layers are brought under. Only `create_column_parallel` is required;
a model that uses row-parallel layers needs `create_row_parallel` too. The optional methods, each used where the
adapter has it and otherwise built from the required ones or from the torch adapter's:

    create_merged_column_parallel(input_size, output_sizes, parallel_context, bias=False)
    create_qkv_parallel(hidden_size, num_heads, num_kv_heads, head_dim, parallel_context, bias=False)
    create_vocab_embedding(num_embeddings, embedding_dim, parallel_context)
    create_lm_head(hidden_size, vocab_size, parallel_context, bias=False, tied_to=None)
    create_norm(hidden_size, parallel_context, eps, partial_gradient)
    vocab_parallel_cross_entropy(logits, targets, parallel_context, vocab_size, ignore_index, label_smoothing)
                          # the loss of each token, targets' shape; 0 where the target is ignore_index
    smooths_labels: bool  # whether that loss has label smoothing (default True); otherwise the torch adapter's is used
    vocab_padding: int    # vocabulary rows are padded to a multiple of this
    plain_products: bool  # layers are x Wᵀ + b and no more (row-parallel ones summed): a server may multiply by its own
                          # kernel
"""

from __future__ import annotations

import logging
from typing import Any, Protocol, runtime_checkable

from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.errors import AdapterError

logger = logging.getLogger(__name__)


@runtime_checkable
class LinearAdapter(Protocol):
    """Makes one library's parallel layers; a class with static methods will do, as will a module."""

    def create_column_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """A layer `[..., input_size] -> [..., output_size / tensor size]` whose weight's rows are sharded.

        Its parameters are `weight` `[output_size / tensor size, input_size]` and, with `bias`, `bias`.
        """
        ...


@runtime_checkable
class FullLinearAdapter(LinearAdapter, Protocol):
    """A linear adapter that makes row-parallel layers too."""

    def create_row_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """A layer `[..., input_size / tensor size] -> [..., output_size]`; the bias is added once, after the sum."""
        ...


def choose_adapter(linear: Any, parallel_context: ParallelContext) -> Any:
    """The layer's own adapter or the context's, in exact mode around it; `AdapterError` where it is none."""
    adapter = linear if linear is not None else parallel_context.linear
    if not isinstance(adapter, LinearAdapter):
        raise AdapterError(
            f"{name_of(adapter)} is not a LinearAdapter: it needs a method "
            "create_column_parallel(input_size, output_size, parallel_context, bias=False)"
        )
    exact = parallel_context.exact
    return adapter if exact is None else exact.around(adapter)


def adapter_with(adapter: Any, method: str) -> Any:
    """The adapter, or the torch adapter's layers where it lacks an optional method."""
    if hasattr(adapter, method):
        return adapter
    logger.info("%s has no %s: the torch adapter's is used", name_of(adapter), method)
    return load_adapter("torch").linear


def name_of(adapter: Any) -> str:
    """An adapter's class, for messages."""
    return adapter.__name__ if isinstance(adapter, type) else type(adapter).__name__


def unwrap_tuples(layer: nn.Module, adapter: Any) -> None:
    """Megatron's layers give `(output, bias)`; a user's adapter may hand them over as they are."""
    if getattr(adapter, "plain_outputs", False):
        return

    def unwrap(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return output
        if len(output) > 1 and output[1] is not None:
            raise AdapterError(
                f"{type(module).__name__} returned a bias that it did not add: build it with skip_bias_add=False"
            )
        return output[0]

    layer.register_forward_hook(unwrap)


def tensor_rank_and_size(parallel_context: ParallelContext) -> tuple[int, int]:
    """Where this process stands along the tensor axis."""
    return (
        parallel_context.get_tensor_parallel_rank(),
        parallel_context.get_tensor_parallel_world_size(),
    )
