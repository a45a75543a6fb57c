"""`TrainableFlashAttention`: the attention block of a decoder, for training and serving."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import nn

from polyshard.attention.alibi import slopes_of_heads
from polyshard.attention.computation import describe_attention
from polyshard.attention.context_parallel.parallel import Way
from polyshard.attention.defaults import rotary_at, sequences_at
from polyshard.attention.dispatch import dispatch_attention
from polyshard.attention.functional import check_spec
from polyshard.attention.positions import check_positions
from polyshard.attention.rotary import RotaryEmbedding, halves, rotate_heads
from polyshard.core.attention import AttentionCore, AttentionSpec, PackedSequences, RotaryCore, SinksCore, without_layer
from polyshard.core.context import ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.errors import ConfigurationError
from polyshard.core.weight_sharding import Segment, WeightLayout
from polyshard.core.weight_table import attach_layouts, store_as
from polyshard.layers.linear import qkv_parallel, row_parallel
from polyshard.layers.norm import rms_norm
from polyshard.layers.residual import add_residual


class TrainableFlashAttention(nn.Module):
    """Multi-head, grouped-query or multi-query self-attention with its projections.

    In training the module runs the fastest kernel with a backward pass for packed sequences. Inside a server it uses
    the server's paged KV cache. Heads are sharded over the tensor axis of `parallel_context`.

    Args:
        hidden_size: size of the hidden states.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads; default: `num_heads`.
        head_dim: size of a query or key head; default: `hidden_size / num_heads`.
        value_dim: size of a value head; default: `head_dim`.
        dropout: probability of dropping an attention weight in training.
        scale: factor on q·k; default: `head_dim ** -0.5`.
        causal: mask keys after the query.
        parallel_context: the parallel context; default: a single process.
        qkv_bias: add a bias in the fused query, key and value projection.
        qkv_names: names of the three projections in a checkpoint, or one name if a checkpoint stores them as one
            tensor.
        output_name: name of the output projection in a checkpoint.
        output_bias: add a bias in the output projection.
        qk_norm_eps: apply an RMS norm with this epsilon to each query and key head before the rotary embedding.
        rotary: the rotary embedding; None for none, or to pass cosines and sines to `forward`.
        interleaved: whether rotated pairs are neighbouring elements of a head, as in Meta's and torchtitan's
            checkpoints, instead of one element from each half, as in Hugging Face's.
        sliding_window: mask keys `j` unless `|i - j| < sliding_window`.
        softcap: bound on the scores, `softcap tanh(s / softcap)` (Gemma 2).
        alibi: subtract `slope |i - j|` from the scores: True for the standard slopes, or one slope for each query head
            (Press et al. 2021, "Train Short, Test Long").
        sinks: add a learned logit of each head, without a value, to the softmax's sum (gpt-oss).
        layer_index: global index of the layer; required in a server with pipeline stages.
        kernel: name of the kernel to use; default: the environment variable POLYSHARD_ATTENTION, else the fastest one.
        context_parallel: method if the context axis has several ranks: `"ulysses"`, `"ring"`, or `"auto"` (Ulysses if
            the heads can be divided over the ranks, else ring).
        linear: the `LinearAdapter` for the projections; default: that of the context.

    Attributes:
        qkv: the fused projection; `qkv.weight` is this rank's `[(q + 2 kv) head_dim, hidden_size]`.
        o_proj: the output projection.
        sinks: this rank's `[heads]`; None without sinks.

    Raises:
        LayoutError: the heads cannot be divided over the tensor axis.
        ConfigurationError: a setting is out of range.

    Examples:
        >>> rotary = ps.RotaryEmbedding(16)
        >>> attention = TrainableFlashAttention(64, num_heads=4, num_kv_heads=2, rotary=rotary)
        >>> attention(torch.randn(2, 5, 64)).shape  # a batch
        torch.Size([2, 5, 64])
        >>> attention(torch.randn(7, 64), cu_seqlens=torch.tensor([0, 3, 7])).shape  # two packed sequences
        torch.Size([7, 64])
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
            raise ConfigurationError(
                f"hidden_size is invalid: got {hidden_size}, expected a multiple of {num_heads} heads. Pass head_dim."
            )
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
            # Each rank normalizes its own heads, so that the weight's gradient is a sum over ranks.
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
        describe_attention(self, self.spec, num_heads, num_kv_heads, slopes, interleaved, rotary)
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
            raise ConfigurationError(
                f"context_parallel is invalid: got {context_parallel!r}, expected one of {', '.join(get_args(Way))}."
            )
        self.sequence_parallel = context.layout.sequence_parallel and size > 1
        self.core: AttentionCore | None = None
        self.serve_in(context)

    def serve_in(self, context: ParallelContext) -> None:
        """Use the attention core that the factory of `context` builds, or a kernel if there is no factory."""
        self.context = context
        factory = context.attention
        self.core = None if factory is None else factory(self.spec, self.sinks)
        exact = context.exact
        own = rotate_heads if exact is None else exact.rotate
        self._rotate = self.core.rotate if isinstance(self.core, RotaryCore) else own

    def renew_sinks(self) -> None:
        """Give the current sinks to the attention core, after the parameter was written or replaced."""
        if self.sinks is not None and isinstance(self.core, SinksCore):
            self.core.use_sinks(self.sinks)

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
        """Compute attention within each sequence.

        Args:
            hidden_states: `[batch, seq, hidden]`, or packed `[tokens, hidden]`. Under sequence parallel: this rank's
                part along seq or tokens. Under context parallel: the part that `context_shard` returns.
            positions: int64 `[batch, seq]` or `[tokens]`, for the module's own rotary embedding; default: from 0 in
                each sequence. They must be consecutive within sequences that are longer than the sliding window.
            cu_seqlens: int32 `[sequences + 1]`, boundaries of packed input, for the tokens of all context-parallel
                ranks; default: one sequence.
            sequences: the same boundaries as returned by `pack`, so that each layer need not check `cu_seqlens`.
            rotary: cosine and sine, computed once for all layers, in place of the module's own rotary embedding.
            residual: tensor in the shape of the output that is added to it (`add_residual`).

        Returns:
            A tensor in the shape of `hidden_states`.

        Raises:
            ConfigurationError: `hidden_states`, `positions` or `cu_seqlens` is invalid.
        """
        if hidden_states.dim() not in (2, 3):
            raise ConfigurationError(
                f"hidden_states has the wrong shape: got {tuple(hidden_states.shape)}, expected [batch, seq, hidden] "
                "or packed [tokens, hidden]."
            )
        q, k, v = self.heads(hidden_states)
        lead = q.shape[:-2]
        if sequences is None and self.core is None:
            sequences = sequences_at(lead, cu_seqlens, self.context, q.device)
        window = self._call_spec.sliding_window
        complete = self.context.axis("context").size == 1  # else this rank has only a part of each sequence
        if positions is not None and window is not None and sequences is not None and complete:
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
            sinks=self._served_sinks(),
            kernel=self.kernel,
        )
        return add_residual(residual, out, self.o_proj)

    def _served_sinks(self) -> torch.Tensor | None:
        """Return the sinks, in exact mode rounded to the dtype in which the server holds them."""
        exact = self.context.exact
        if self.sinks is None or exact is None or exact.compute_dtype is None:
            return self.sinks
        return self.sinks.to(exact.compute_dtype).to(self.sinks.dtype)

    def heads(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return this rank's query, key and value heads, each `[..., heads, dim]`, before the rotary embedding."""
        spec = self._call_spec
        sizes = [spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.num_kv_heads * spec.v_dim]
        q, k, v = self.qkv(hidden_states).split(sizes, dim=-1)
        q, k = q.unflatten(-1, (-1, spec.head_dim)), k.unflatten(-1, (-1, spec.head_dim))
        v = v.unflatten(-1, (-1, spec.v_dim))
        if self.q_norm is not None and self.k_norm is not None:
            # Under autocast the norm's output is float32, as its weight; attention requires one dtype.
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return q, k, v
