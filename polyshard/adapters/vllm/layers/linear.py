"""vLLM's parallel layers behind polyshard's `LinearAdapter`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyshard.adapters.vllm.compat import (
    DEFAULT_VOCAB_PADDING_SIZE,
    QKV_SHARD_IDS,
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from polyshard.adapters.vllm.layers.activation import use_swiglu_operator
from polyshard.adapters.vllm.layers.matmul import (
    LookupMethod,
    PackedGateUpMethod,
    PackedHeadMethod,
    PackedLinearMethod,
    is_gate_up,
    use_selected_matmul,
)
from polyshard.adapters.vllm.layers.norm import rms_norm, uses_single_operator
from polyshard.core.context import ParallelContext
from polyshard.core.errors import AdapterError


class VllmHead(nn.Module):
    """`ParallelLMHead` as a callable layer; vLLM itself applies it through its logits processor."""

    def __init__(self, hidden_size: int, vocab_size: int, bias: bool, tied_to: Any) -> None:
        super().__init__()
        head = use_selected_matmul(ParallelLMHead(vocab_size, hidden_size, bias=bias), PackedHeadMethod)
        self.head: Any = head if tied_to is None else head.tie_weights(tied_to)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return local logits `[..., padded vocabulary / tensor size]`; the engine gathers and drops the padding."""
        return self.head.quant_method.apply(self.head, hidden, bias=self.head.bias)


class CpuRMSNorm(RMSNorm):
    """vLLM's norm as a single operator; on CPU vLLM's own layer runs separate torch operations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of `[..., hidden]`, in the same shape."""
        if not uses_single_operator(x, self.weight):
            return super().forward(x)
        return rms_norm(x, self.weight, self.variance_epsilon)


class VllmLinearAdapter:
    """`LinearAdapter` of vLLM; a layer's `shard_ids` are the names that its weight loader gives the layout's segments.

    Args:
        quantized: whether the checkpoint is quantized; layers are then built in two steps.
    """

    plain_outputs = True
    vocab_padding = DEFAULT_VOCAB_PADDING_SIZE

    def __init__(self, quantized: bool = False) -> None:
        self._quantized = quantized

    def _make(self, kind: Any, *args: Any, method: Any = PackedLinearMethod, **kwargs: Any) -> Any:
        """Return a layer; for a quantized checkpoint without memory, to be rebuilt under its name (`quantized.py`)."""
        if not self._quantized:
            return use_selected_matmul(kind(*args, **kwargs), method)
        with torch.device("meta"):
            layer = kind(*args, **kwargs)

        def rebuild(quant_config: Any, prefix: str) -> None:
            kind.__init__(layer, *args, **kwargs, quant_config=quant_config, prefix=prefix)

        layer.rebuild = rebuild
        return layer

    def create_column_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Return vLLM's `ColumnParallelLinear`."""
        return self._make(
            ColumnParallelLinear, input_size, output_size, bias=bias, gather_output=False, return_bias=False
        )

    def create_merged_column_parallel(
        self, input_size: int, output_sizes: list[int], parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Return vLLM's `MergedColumnParallelLinear`."""
        method = PackedGateUpMethod if is_gate_up(output_sizes) else PackedLinearMethod
        layer = self._make(
            MergedColumnParallelLinear, input_size, output_sizes, method=method, bias=bias, return_bias=False
        )
        layer.shard_ids = tuple(range(len(output_sizes)))
        if method is PackedGateUpMethod and not self._quantized and layer.weight.device.type == "cuda":
            use_swiglu_operator(layer)
        return layer

    def create_qkv_parallel(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        parallel_context: ParallelContext,
        bias: bool = False,
    ) -> nn.Module:
        """Return vLLM's `QKVParallelLinear`."""
        layer = self._make(
            QKVParallelLinear, hidden_size, head_dim, num_heads, num_kv_heads, bias=bias, return_bias=False
        )
        layer.shard_ids = QKV_SHARD_IDS
        return layer

    def create_row_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Return vLLM's `RowParallelLinear`."""
        return self._make(
            RowParallelLinear, input_size, output_size, bias=bias, input_is_parallel=True, return_bias=False
        )

    def create_vocab_embedding(
        self, num_embeddings: int, embedding_dim: int, parallel_context: ParallelContext
    ) -> nn.Module:
        """Return vLLM's `VocabParallelEmbedding`."""
        return use_selected_matmul(VocabParallelEmbedding(num_embeddings, embedding_dim), LookupMethod)

    def create_lm_head(
        self,
        hidden_size: int,
        vocab_size: int,
        parallel_context: ParallelContext,
        bias: bool = False,
        tied_to: nn.Module | None = None,
    ) -> nn.Module:
        """Return vLLM's `ParallelLMHead`."""
        return VllmHead(hidden_size, vocab_size, bias, tied_to)

    def create_norm(
        self, hidden_size: int, parallel_context: ParallelContext, eps: float, partial_gradient: bool
    ) -> nn.Module:
        """Return vLLM's `RMSNorm`."""
        return (CpuRMSNorm if parallel_context.device.type == "cpu" else RMSNorm)(hidden_size, eps=eps)

    def vocab_parallel_cross_entropy(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raise `AdapterError`: a server computes no loss."""
        raise AdapterError(
            "vLLM's layers compute no loss, since they have no backward pass. Train with another adapter"
        )
