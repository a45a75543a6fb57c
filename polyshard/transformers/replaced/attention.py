"""The module that replaces an attention module, with the calling convention of transformers' decoder layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyshard.attention.module import TrainableFlashAttention
from polyshard.attention.rotary import apply_rotary
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.exact_identity import exact_kernel
from polyshard.core.weight_sharding import replicated
from polyshard.core.weight_table import attach_layouts
from polyshard.layers.differentiable import sum_gradient
from polyshard.transformers.replaced.batch import attend_batch, given_boundaries, packed_boundaries, used_mask
from polyshard.transformers.replaced.caches import extend, note_packed
from polyshard.transformers.replaced.keywords import refuse_unknown
from polyshard.transformers.replaced.recognize import Found


class ReplacedAttention(TrainableFlashAttention):
    """`TrainableFlashAttention` with another module's weights and calling convention.

    Its checkpoint names are those of the replaced module. In a serving engine it uses the engine's cache.
    """

    def __init__(self, found: Found, context: ParallelContext | None, kernel: str | None) -> None:
        first = found.projections[0].weight
        device = context.device if first.is_meta and context is not None else first.device
        with torch.device(device):
            super().__init__(
                found.hidden_size,
                found.num_heads,
                found.num_kv_heads,
                found.head_dim,
                dropout=found.dropout,
                scale=found.scale,
                causal=found.causal,
                parallel_context=context,
                qkv_names="qkv_proj" if len(found.projections) == 1 else ("q_proj", "k_proj", "v_proj"),
                qkv_bias=found.projections[0].bias is not None,
                output_bias=found.output.bias is not None,
                sliding_window=found.sliding_window,
                softcap=found.softcap,
                sinks=found.sinks is not None,
                layer_index=found.layer_index,
                kernel=kernel,
            )
        self.to(device=device, dtype=first.dtype)
        self.uses_rotary = found.rotary
        self.rotary_doubled = True  # whether cosine and sine are repeated for both halves, as in all but gpt-oss
        if found.norms is not None:
            alone = self.context.get_tensor_parallel_world_size() == 1 or self.core is not None
            for name, norm in zip(("q_norm", "k_norm"), found.norms):
                setattr(self, name, norm if alone else SummedNorm(norm, self.context))

    def forward(  # pyrefly: ignore  # transformers' convention, not the parent's
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        position_ids: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        cache: Any = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Compute attention.

        Args:
            hidden_states: `[batch, seq, hidden]`.
            position_embeddings: cosine and sine, each `[batch, seq, rotary_dim]` with equal halves, or only one half.
            attention_mask: `[batch, keys]`, True or 1 for tokens that count; `[batch, 1, seq, keys]` as in
                transformers; None if all tokens count.
            past_key_values: a transformers cache, to which this layer's keys and values are added.
            position_ids: `[batch, seq]`; a new sequence starts where they do not increase.
            cu_seq_lens_q: boundaries of the sequences in the flattened batch.
            cu_seq_lens_k: boundaries of the keys; must be equal to `cu_seq_lens_q`.
            cache: the name of `past_key_values` in transformers 5.24 and later.
            is_causal: must equal the setting that the module was built with.
            kwargs: ignored if they do not affect attention.

        Returns:
            `[batch, seq, hidden]`, and None for the attention weights, which no flash kernel computes.

        Raises:
            ConfigurationError: an argument is unknown, or asks for attention weights.
        """
        refuse_unknown(kwargs, "ReplacedAttention")
        if past_key_values is None:
            past_key_values = cache
        elif cache is not None and cache is not past_key_values:
            raise ConfigurationError(
                f"ReplacedAttention was given two caches: got {type(past_key_values).__name__} as past_key_values and "
                f"{type(cache).__name__} as cache, expected one. Pass one of them."
            )
        batch, length = hidden_states.shape[:2]
        spec = self.spec
        if is_causal is not None and bool(is_causal) != spec.causal:
            raise ConfigurationError(
                f"is_causal of attention layer {spec.layer_index} is wrong: got {is_causal}, expected {spec.causal}, "
                "with which it was built. Omit it."
            )
        q, k, v = self.heads(hidden_states)
        if position_embeddings is not None and self.uses_rotary:
            parts = 2 if self.rotary_doubled else 1
            cos, sin = (t[..., : t.shape[-1] // parts].unsqueeze(-2) for t in position_embeddings)
            if self.core is None and self.context.exact is None:
                q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
            else:
                turned = self._rotate(*(t.flatten(0, 1) for t in (q, k, cos, sin)))
                q, k = (t.unflatten(0, (batch, length)) for t in turned)
        if self.core is not None:
            q, k, v = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
            return self.o_proj(self.core(q, k, v, None).reshape(batch, length, -1)), None
        held = 0
        if past_key_values is not None:
            k, v, held = extend(past_key_values, k, v, spec.layer_index)
        mask = used_mask(attention_mask, k.shape[1])
        if cu_seq_lens_q is not None:
            bounds = given_boundaries(cu_seq_lens_q, cu_seq_lens_k, position_ids, batch, spec.sliding_window)
        else:
            bounds = packed_boundaries(position_ids, batch, length, mask)
        if past_key_values is not None:
            note_packed(past_key_values, held, bounds is not None)
        out = attend_batch(
            q,
            k,
            v,
            mask,
            bounds,
            scale=spec.scale,
            causal=spec.causal,
            sliding_window=spec.sliding_window,
            softcap=spec.softcap,
            dropout=spec.dropout if self.training else 0.0,
            head_offset=spec.head_offset,
            sinks=self.sinks,
            kernel=exact_kernel(self.context, self.kernel),
            last_counts=past_key_values is not None,
        )
        return self.o_proj(out.flatten(-2)), None


class SummedNorm(nn.Module):
    """A norm of heads that are sharded over ranks: the gradients of its weights are summed over the ranks."""

    def __init__(self, norm: nn.Module, context: ParallelContext) -> None:
        super().__init__()
        self.norm = norm
        self.axis = context.axis("tensor")
        layouts = {name: replicated(tuple(weight.shape)) for name, weight in norm.named_parameters()}
        attach_layouts(self, layouts, self.axis.rank, self.axis.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the norm: `[..., head_dim]` to the same shape."""
        weights = {name: sum_gradient(weight, self.axis) for name, weight in self.norm.named_parameters()}
        return torch.func.functional_call(self.norm, weights, (x,))
