"""`TrainableMLA`: DeepSeek's multi-head latent attention (MLA), in the form with expanded keys and values.

Source: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyshard.attention.computation import describe_attention
from polyshard.attention.context_parallel.parallel import Way
from polyshard.attention.defaults import rotary_at, sequences_at
from polyshard.attention.dispatch import dispatch_attention
from polyshard.attention.functional import check_spec
from polyshard.attention.rotary import RotaryEmbedding, apply_rotary, halves
from polyshard.core.attention import (
    AttentionCore,
    AttentionSpec,
    LatentCore,
    LatentSpec,
    PackedSequences,
    without_layer,
)
from polyshard.core.context import ParallelAxis, ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.errors import ConfigurationError, LayoutError
from polyshard.layers.linear import column_parallel, replicated_linear, row_parallel
from polyshard.layers.norm import rms_norm
from polyshard.layers.residual import add_residual


class TrainableMLA(nn.Module):
    """Multi-head latent attention: low-rank latents for queries and for keys and values, and a shared rotary key.

    Heads are sharded over the tensor axis of `parallel_context`; the projections to the latents are replicated. A
    server may cache latents with its own layer (docs/explanation/attention.md says when). Otherwise it caches the
    expanded keys and values like ordinary attention, which always works but needs the memory of full heads.

    Args:
        hidden_size: size of the hidden states.
        num_heads: number of heads.
        kv_lora_rank: size of the latent of keys and values.
        qk_nope_head_dim: size of the part of a query or key head without rotary embedding.
        qk_rope_head_dim: size of the part with rotary embedding.
        v_head_dim: size of a value head.
        q_lora_rank: size of the latent of queries; None for a direct projection.
        scale: factor on q·k; default: `(qk_nope_head_dim + qk_rope_head_dim) ** -0.5`. Models with YaRN multiply it by
            the square of its mscale.
        norm_eps: epsilon of the norms of both latents.
        rotary: the rotary embedding for `qk_rope_head_dim`; None to pass cosines and sines to `forward`.
        interleaved: whether rotated pairs are neighbouring elements of a head, as in DeepSeek's checkpoints.
        bias: add a bias in the projections to the latents and in the output projection.
        dropout: probability of dropping an attention weight in training.
        parallel_context: the parallel context; default: a single process.
        layer_index: global index of the layer; required in a server with pipeline stages.
        kernel: name of the kernel to use; default: the environment variable POLYSHARD_ATTENTION, else the fastest one.
        context_parallel: method under context parallel: `"auto"`, `"ulysses"` or `"ring"`.
        linear: the `LinearAdapter` for the sharded projections; default: that of the context.

    Raises:
        LayoutError: the heads cannot be divided over the tensor axis, or sequence parallel is on (unsupported here).
        ConfigurationError: a setting is out of range.

    Examples:
        >>> sizes = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
        >>> attention = TrainableMLA(64, 4, **sizes, rotary=ps.RotaryEmbedding(8))
        >>> attention(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        rotary: RotaryEmbedding | None = None,
        interleaved: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        parallel_context: ParallelContext | None = None,
        layer_index: int | None = None,
        kernel: str | None = None,
        context_parallel: Way = "auto",
        linear: Any = None,
    ) -> None:
        super().__init__()
        context = parallel_context or load_adapter("torch").initialize()
        size = context.get_tensor_parallel_world_size()
        if context.layout.sequence_parallel and size > 1:
            raise LayoutError(
                "TrainableMLA does not support sequence parallel: its replicated projections need all tokens. "
                "Initialize the context without sequence_parallel."
            )
        if num_heads % size:
            raise LayoutError(
                f"{num_heads} heads cannot be divided by tensor-parallel size {size}. Use a tensor-parallel size that "
                f"divides {num_heads}."
            )
        if qk_rope_head_dim % 2:
            raise ConfigurationError(f"qk_rope_head_dim is invalid: got {qk_rope_head_dim}, expected an even number.")
        self.parts = (qk_nope_head_dim, qk_rope_head_dim, v_head_dim)
        self.kv_lora_rank = kv_lora_rank
        query, shared = num_heads * (qk_nope_head_dim + qk_rope_head_dim), {"parallel_context": context}
        if q_lora_rank is None:
            self.q_a_proj = self.q_a_layernorm = self.q_b_proj = None
            self.q_proj = column_parallel(hidden_size, query, **shared, linear=linear)
        else:
            self.q_proj = None
            self.q_a_proj = replicated_linear(hidden_size, q_lora_rank, context, bias=bias)
            self.q_a_layernorm = rms_norm(q_lora_rank, **shared, eps=norm_eps)
            self.q_b_proj = column_parallel(q_lora_rank, query, **shared, linear=linear)
        compressed = kv_lora_rank + qk_rope_head_dim
        self.kv_a_proj_with_mqa = replicated_linear(hidden_size, compressed, context, bias=bias)
        self.kv_a_layernorm = rms_norm(kv_lora_rank, **shared, eps=norm_eps)
        expanded = num_heads * (qk_nope_head_dim + v_head_dim)
        self.kv_b_proj = column_parallel(kv_lora_rank, expanded, **shared, linear=linear)
        self.o_proj = row_parallel(num_heads * v_head_dim, hidden_size, **shared, bias=bias, linear=linear)
        head_dim = qk_nope_head_dim + qk_rope_head_dim
        self.spec = AttentionSpec(
            num_heads=num_heads // size,
            num_kv_heads=num_heads // size,
            head_dim=head_dim,
            value_dim=v_head_dim,
            scale=head_dim**-0.5 if scale is None else scale,
            dropout=dropout,
            layer_index=layer_index,
            head_offset=context.get_tensor_parallel_rank() * (num_heads // size),
        )
        check_spec(self.spec)
        describe_attention(self, self.spec, num_heads, num_heads, None, interleaved, rotary)
        self._call_spec = without_layer(self.spec)
        self.rotary, self.interleaved, self.kernel = rotary, interleaved, kernel
        self.context_parallel = context_parallel
        self.latents = LatentSpec(
            nope_dim=qk_nope_head_dim, rope_dim=qk_rope_head_dim, kv_rank=kv_lora_rank, q_rank=q_lora_rank
        )
        self.core: AttentionCore | None = None
        self.latent_core: LatentCore | None = None
        self.serve_in(context)

    def serve_in(self, context: ParallelContext) -> None:
        """Use the core that `context` builds: over a cache of latents if it supports that, else over keys and values.

        Without a factory in `context` the module uses a kernel.
        """
        self.context = context
        latents, factory = context.latent_attention, context.attention
        self.latent_core = None if latents is None else latents(self.spec, self.latents, self.kv_b_proj)
        self.core = factory(self.spec) if factory and self.latent_core is None else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        *,
        sequences: PackedSequences | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute attention within each sequence. Arguments and result are as in `TrainableFlashAttention.forward`."""
        lead = hidden_states.shape[:-1]
        nope, rope, value = self.parts
        if sequences is None and self.core is None and self.latent_core is None:
            sequences = sequences_at(lead, cu_seqlens, self.context, hidden_states.device)
        if rotary is None and self.rotary is not None:
            rotary = rotary_at(self.rotary, positions, sequences, lead, self.context, hidden_states)

        q = self._queries(hidden_states).unflatten(-1, (-1, nope + rope))
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, rope], dim=-1)
        latent = self.kv_a_layernorm(latent)
        # All heads share the rotary key, so that its gradient is a sum over the ranks.
        k_rope = shared_by_heads(k_rope, self.context.axis("tensor")).unsqueeze(-2)
        q_nope, q_rope = q.split([nope, rope], dim=-1)
        if rotary is not None:
            if self.interleaved:
                q_rope, k_rope = halves(q_rope, rope), halves(k_rope, rope)
            q_rope, k_rope = (apply_rotary(t, *rotary) for t in (q_rope, k_rope))
        q = torch.cat((q_nope, q_rope), dim=-1)
        if self.latent_core is not None:
            out = self.latent_core(q.flatten(0, -3), latent.flatten(0, -2), k_rope.flatten(0, -3))
            return add_residual(residual, out.flatten(-2).unflatten(0, lead), self.o_proj)

        kv = self.kv_b_proj(latent).unflatten(-1, (-1, nope + value))
        k_nope, v = kv.split([nope, value], dim=-1)
        k = torch.cat((k_nope, k_rope.expand(*k_nope.shape[:-1], rope)), dim=-1)
        out = dispatch_attention(
            self.core,
            q,
            k,
            v,
            sequences,
            self._call_spec,
            self.context,
            self.context_parallel,
            training=self.training,
            kernel=self.kernel,
        )
        return add_residual(residual, out, self.o_proj)

    def _queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.q_proj is not None:
            return self.q_proj(hidden_states)
        assert self.q_a_proj is not None
        assert self.q_a_layernorm is not None
        assert self.q_b_proj is not None
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))


def shared_by_heads(x: torch.Tensor, axis: ParallelAxis) -> torch.Tensor:
    """Return `x`; the backward pass sums the gradient over the axis."""
    return x if axis.size == 1 else _Shared.apply(x, axis)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: ParallelAxis) -> torch.Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.axis.collectives.all_reduce(gradients[0]), None
