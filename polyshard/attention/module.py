"""`TrainableFlashAttention`: the attention block of a decoder that is trained and served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import nn

from polyshard.attention.alibi import slopes_of_heads
from polyshard.attention.context_parallel.parallel import Way
from polyshard.attention.defaults import rotary_at, sequences_at
from polyshard.attention.dispatch import dispatch_attention
from polyshard.attention.functional import check_spec
from polyshard.attention.positions import check_positions
from polyshard.attention.rotary import RotaryEmbedding, halves, rotate_heads
from polyshard.core.attention import AttentionCore, AttentionSpec, PackedSequences, RotaryCore, without_layer
from polyshard.core.context import ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.errors import ConfigurationError
from polyshard.core.weight_layout import Segment, WeightLayout
from polyshard.core.weight_table import attach_layouts, store_as
from polyshard.layers.linear import qkv_parallel, row_parallel
from polyshard.layers.norm import rms_norm
from polyshard.layers.residual import add_residual


class TrainableFlashAttention(nn.Module):
    """Multi-head, grouped-query or multi-query self-attention with its projections.

    In training it runs the fastest trainable kernel for packed sequences; inside a serving engine the same module
    uses that engine's paged KV cache. Heads are sharded over the tensor axis of `parallel_context`.

    Args:
        hidden_size: size of the hidden states.
        num_heads: query heads.
        num_kv_heads: key and value heads; default `num_heads`.
        head_dim: default `hidden_size / num_heads`.
        value_dim: size of a value head; default `head_dim`.
        dropout: of attention weights, in training.
        scale: factor on q·k; default `head_dim ** -0.5`.
        causal: mask keys after the query.
        parallel_context: where this process stands; default one process alone.
        qkv_bias: bias of the fused query, key and value projection.
        qkv_names: of the three in a checkpoint, or the one name under which it holds them as one tensor.
        output_name: of the output projection in a checkpoint.
        output_bias: bias of the output projection.
        qk_norm_eps: RMS norm of each query and key head before the rotary embedding, with this epsilon.
        rotary: makes cosines and sines from positions; None for no rotary embedding here (or to pass them in).
        interleaved: whether rotated pairs are neighbours, as in Meta's checkpoints and torchtitan's, and not halves of
            a head, as in Hugging Face's.
        sliding_window: see this many keys back, the query's own included.
        softcap: bound on scores, `softcap tanh(s / softcap)` (Gemma 2).
        alibi: take `slope |i - j|` from scores: True for the usual slopes, or one for each query head (Press et al.
            2021, "Train Short, Test Long").
        sinks: a learned logit of each head that takes part in the softmax and gives nothing (gpt-oss).
        layer_index: global index of the layer; a serving engine with pipeline stages needs it.
        kernel: force a kernel by name; also by the environment variable POLYSHARD_ATTENTION.
        context_parallel: where the context axis has several ranks, `"ulysses"`, `"ring"`, or `"auto"`: Ulysses where
            heads divide, else ring.
        linear: another library's layers for the projections.

    Attributes:
        qkv: the fused projection, `qkv.weight` `[(q + 2 kv) head_dim, hidden_size]` of this rank.
        o_proj: the output projection.
        sinks: `[heads]` of this rank; None without.

    Raises:
        LayoutError: heads that do not divide over the tensor axis.
        ConfigurationError: settings outside their range.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        causal: bool = True,
        parallel_context: ParallelContext | None = None,
        *,
        value_dim: int | None = None,
        qkv_bias: bool = False,
        qkv_names: Sequence[str] | str = ("q_proj", "k_proj", "v_proj"),
        output_name: str = "o_proj",
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        rotary: RotaryEmbedding | None = None,
        interleaved: bool = False,
        sliding_window: int | None = None,
        softcap: float | None = None,
        alibi: bool | Sequence[float] = False,
        sinks: bool = False,
        layer_index: int | None = None,
        kernel: str | None = None,
        context_parallel: Way = "auto",
        linear: Any = None,
    ) -> None:
        super().__init__()
        if head_dim is None and hidden_size % num_heads:
            raise ConfigurationError(f"hidden size {hidden_size} is not a multiple of {num_heads} heads: give head_dim")
        head_dim = head_dim or hidden_size // num_heads
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        context = parallel_context or load_adapter("torch").initialize()
        size = context.get_tensor_parallel_world_size()

        value_dim = value_dim or head_dim
        heads = (num_heads, num_kv_heads, head_dim)
        apart = None if isinstance(qkv_names, str) else qkv_names
        self.qkv = qkv_parallel(
            hidden_size, *heads, context, bias=qkv_bias, value_dim=value_dim, names=apart, linear=linear
        )
        self.o_proj = row_parallel(num_heads * value_dim, hidden_size, context, bias=output_bias, linear=linear)
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            # Each rank normalises its own heads: the weight's gradient is a sum over ranks.
            self.q_norm = rms_norm(head_dim, context, eps=qk_norm_eps, partial_gradient=True)
            self.k_norm = rms_norm(head_dim, context, eps=qk_norm_eps, partial_gradient=True)
        self.rotary, self.interleaved = rotary, interleaved
        local = num_heads // size
        first = context.get_tensor_parallel_rank() * local
        slopes = slopes_of_heads(num_heads, alibi)
        self.spec = AttentionSpec(
            num_heads=local,
            num_kv_heads=max(1, num_kv_heads // size),
            head_dim=head_dim,
            value_dim=value_dim,
            scale=head_dim**-0.5 if scale is None else scale,
            causal=causal,
            sliding_window=sliding_window,
            softcap=softcap,
            alibi_slopes=None if slopes is None else slopes[first : first + local],
            sinks=sinks,
            dropout=dropout,
            layer_index=layer_index,
            head_offset=first,
        )
        check_spec(self.spec)
        self._call_spec = without_layer(self.spec)
        self.sinks: nn.Parameter | None = None
        if sinks:
            self.sinks = nn.Parameter(torch.zeros(local, device=context.device))
            layout = WeightLayout(shape=(num_heads,), dim=0, segments=(Segment(size=num_heads),))
            attach_layouts(self, {"sinks": layout}, context.get_tensor_parallel_rank(), size)
        if isinstance(qkv_names, str):
            store_as(self, "qkv", qkv_names)
        if output_name != "o_proj":
            store_as(self, "o_proj", output_name)
        self.kernel = kernel
        self.context, self.context_parallel = context, context_parallel
        if context_parallel not in get_args(Way):
            raise ConfigurationError(f"context_parallel must be one of {get_args(Way)}, got {context_parallel!r}")
        self.sequence_parallel = context.layout.sequence_parallel and size > 1
        self.core: AttentionCore | None = None
        self.serve_in(context)

    def serve_in(self, context: ParallelContext) -> None:
        """Attend by the core that `context` brings, if it brings one."""
        self.context = context
        factory = context.attention
        self.core = None if factory is None else factory(self.spec, self.sinks)
        exact = context.exact
        own = rotate_heads if exact is None else exact.rotate
        self._rotate = self.core.rotate if isinstance(self.core, RotaryCore) else own

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
        """Attend within each sequence.

        Args:
            hidden_states: `[batch, seq, hidden]`, or packed `[tokens, hidden]`. Under sequence parallel: this rank's
                part along seq or tokens. Under context parallel: the part that `context_shard` cuts.
            positions: int64 `[batch, seq]` or `[tokens]`, for the module's own rotary embedding; default: from 0 in
                each sequence. With a sliding window they have to be consecutive in sequences longer than it.
            cu_seqlens: int32 `[sequences + 1]` for packed input, of all context-parallel ranks' tokens; default: one
                sequence.
            sequences: the same, already checked; spares each layer the reading of `cu_seqlens`.
            rotary: cosine and sine for all layers, in place of the module's own rotary embedding.
            residual: to be added to the output, of its shape (`add_residual`).

        Returns:
            The shape of `hidden_states`.
        """
        if hidden_states.dim() not in (2, 3):
            raise ConfigurationError(
                "hidden states must be [batch, seq, hidden] or packed [tokens, hidden], "
                f"got {tuple(hidden_states.shape)}"
            )
        q, k, v = self.heads(hidden_states)
        lead = q.shape[:-2]
        if sequences is None and self.core is None:
            sequences = sequences_at(lead, cu_seqlens, self.context, q.device)
        window = self._call_spec.sliding_window
        alone = self.context.axis("context").size == 1  # else this rank has some tokens of each sequence
        if positions is not None and window is not None and sequences is not None and alone:
            check_positions(positions.flatten(), sequences.cu_seqlens, window)
        if rotary is None and self.rotary is not None:
            rotary = rotary_at(self.rotary, positions, sequences, lead, self.context, q)
        if rotary is not None:
            if self.interleaved:
                q, k = (halves(t, 2 * rotary[0].shape[-1]) for t in (q, k))
            q, k = self._rotate(q, k, *rotary)

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
            sinks=self.sinks,
            kernel=self.kernel,
        )
        return add_residual(residual, out, self.o_proj)

    def heads(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This rank's query, key and value heads, each `[..., heads, dim]`, normed, not yet rotated."""
        spec = self._call_spec
        sizes = [spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.num_kv_heads * spec.v_dim]
        q, k, v = self.qkv(hidden_states).split(sizes, dim=-1)
        q, k = q.unflatten(-1, (-1, spec.head_dim)), k.unflatten(-1, (-1, spec.head_dim))
        v = v.unflatten(-1, (-1, spec.v_dim))
        if self.q_norm is not None and self.k_norm is not None:
            # Under autocast the norm's float32 weight widens its output; attention takes one dtype.
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return q, k, v
