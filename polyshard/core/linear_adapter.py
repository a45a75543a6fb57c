"""`LinearAdapter`: the protocol through which `ps.column_parallel` and related functions build a library's layers.

Only `create_column_parallel` is required; a model with row-parallel layers also needs `create_row_parallel`. The
following methods and attributes are optional. If an adapter lacks one, polyshard builds the layer from the required
methods or uses the torch adapter's:

    create_merged_column_parallel(input_size, output_sizes, parallel_context, bias=False)
    create_qkv_parallel(hidden_size, num_heads, num_kv_heads, head_dim, parallel_context, bias=False)
    create_vocab_embedding(num_embeddings, embedding_dim, parallel_context)
    create_lm_head(hidden_size, vocab_size, parallel_context, bias=False, tied_to=None)
    create_norm(hidden_size, parallel_context, eps, partial_gradient)
    create_experts(bank, parallel_context)  # see polyshard.core.experts.ExpertsAdapter
    vocab_parallel_cross_entropy(logits, targets, parallel_context, vocab_size, ignore_index, label_smoothing)
                          # the loss of each token, in the shape of targets; 0 where the target is ignore_index
    smooths_labels: bool  # whether that loss supports label smoothing (default True); if not, the torch adapter's is
                          # used
    vocab_padding: int    # vocabulary rows are padded to a multiple of this
    plain_products: bool  # whether layers compute only x Wᵀ + b (row-parallel layers: summed over ranks), so that a
                          # server may run the matmul with its own kernel
    plain_outputs: bool   # whether layers return a tensor and never Megatron's (output, bias)
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
    """The protocol of an object that builds one library's parallel layers.

    A class with static methods or a module also satisfies it.

    Examples:
        The smallest adapter, for one rank:

        >>> class Unsharded:
        ...     @staticmethod
        ...     def create_column_parallel(input_size, output_size, parallel_context, bias=False):
        ...         return nn.Linear(input_size, output_size, bias=bias)
        >>> ps.column_parallel(4, 8, ps.initialize("torch"), linear=Unsharded)
        Linear(in_features=4, out_features=8, bias=False)
    """

    def create_column_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Build a layer `[..., input_size] -> [..., output_size / tensor size]` whose weight is sharded by rows.

        The layer's parameters must be `weight` `[output_size / tensor size, input_size]` and, if `bias` is set,
        `bias` `[output_size / tensor size]`.
        """
        ...


@runtime_checkable
class FullLinearAdapter(LinearAdapter, Protocol):
    """A `LinearAdapter` that also builds row-parallel layers.

    Examples:
        >>> isinstance(ps.load_adapter("torch").linear, FullLinearAdapter)
        True
    """

    def create_row_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Build a layer `[..., input_size / tensor size] -> [..., output_size]`.

        The layer sums over the tensor axis and adds the bias once, after the sum.
        """
        ...


def choose_adapter(linear: Any, parallel_context: ParallelContext) -> Any:
    """Return the adapter for one layer: `linear` or the context's default, wrapped for exact mode if that is on.

    Raises:
        AdapterError: it is not a `LinearAdapter`.
    """
    adapter = linear if linear is not None else parallel_context.linear
    if not isinstance(adapter, LinearAdapter):
        raise AdapterError(
            f"{name_of(adapter)} is not a LinearAdapter: the method create_column_parallel is missing. Add "
            "create_column_parallel(input_size, output_size, parallel_context, bias=False)."
        )
    exact = parallel_context.exact
    return adapter if exact is None else exact.wrap_adapter(adapter)


def adapter_with(adapter: Any, method: str) -> Any:
    """Return the adapter if it has an optional method, else the torch adapter's `LinearAdapter`."""
    if hasattr(adapter, method):
        return adapter
    logger.info("%s has no method %s; the torch adapter's is used", name_of(adapter), method)
    return load_adapter("torch").linear


def name_of(adapter: Any) -> str:
    """Return the name of an adapter's class, for messages."""
    return adapter.__name__ if isinstance(adapter, type) else type(adapter).__name__


def unwrap_tuples(layer: nn.Module, adapter: Any) -> None:
    """Make a layer return its output only, if it returns `(output, bias)` as Megatron's layers do.

    A user's adapter may return Megatron's layers unchanged. The hook raises `AdapterError` if there is a bias that the
    layer has not added.
    """
    if getattr(adapter, "plain_outputs", False):
        return

    def unwrap(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return output
        if len(output) > 1 and output[1] is not None:
            raise AdapterError(
                f"{type(module).__name__} returned a bias that it did not add. Build the layer with "
                "skip_bias_add=False."
            )
        return output[0]

    layer.register_forward_hook(unwrap)


def tensor_rank_and_size(parallel_context: ParallelContext) -> tuple[int, int]:
    """Return this process's position along the tensor axis, and the size of that axis."""
    return (
        parallel_context.get_tensor_parallel_rank(),
        parallel_context.get_tensor_parallel_world_size(),
    )
