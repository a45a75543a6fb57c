"""polyshard's attention as an implementation of transformers' attention interface, for modules that were not replaced.

Source: transformers 5, modeling_utils.AttentionInterface and masking_utils.AttentionMaskInterface.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyshard.core.errors import ConfigurationError
from polyshard.transformers.replaced.batch import attend_batch, given_boundaries, packed_boundaries, used_mask
from polyshard.transformers.replaced.keywords import refuse_unknown
from polyshard.transformers.replaced.masks import slot_mask

IMPLEMENTATION = "polyshard"


def register() -> None:
    """Register the implementation with transformers. It only affects models that select it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, slot_mask)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention: `query`, `key`, `value` `[batch, heads, seq, head_dim]` to `[batch, seq, heads, head_dim]`.

    Raises:
        ConfigurationError: the module passes an unknown argument, or asks for attention weights.
    """
    refuse_unknown(kwargs, f"polyshard's attention of {type(module).__name__}")
    core: Any = getattr(module, "polyshard_core", None)
    if core is not None:
        return _attend_in_engine(core, query, key, value, scaling, sliding_window, softcap), None
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    batch, _, length, _ = query.shape
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if attention_mask is not None and attention_mask.dim() == 2:  # as created by slot_mask: up to the last query
        k, v = (t[:, : attention_mask.shape[1]] for t in (k, v))
    mask = used_mask(attention_mask, k.shape[1])
    if cu_seq_lens_q is not None:
        bounds = given_boundaries(cu_seq_lens_q, cu_seq_lens_k, position_ids, batch, sliding_window)
    else:
        bounds = packed_boundaries(position_ids, batch, length, mask)
    out = attend_batch(
        q,
        k,
        v,
        mask,
        bounds,
        scale=scaling,
        causal=causal,
        sliding_window=sliding_window,
        softcap=softcap,
        dropout=dropout,
        head_offset=getattr(module, "polyshard_head_offset", 0),
        sinks=s_aux,
        kernel=getattr(module, "polyshard_kernel", None),
        last_counts=not torch.is_grad_enabled(),  # this function does not see the cache
    )
    return out, None


def _attend_in_engine(
    core: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Compute attention with a serving engine's cache, whose layout was fixed before; the arguments must agree with it.

    Raises:
        ConfigurationError: they differ.
    """
    spec = core.spec
    for name, asked, had in (
        ("heads", query.shape[1], spec.num_heads),
        ("key-value heads", key.shape[1], spec.num_kv_heads),
        ("scaling", spec.scale if scaling is None else float(scaling), spec.scale),
        ("sliding_window", sliding_window, spec.sliding_window),
        ("softcap", softcap, spec.softcap),
    ):
        if asked != had and not (isinstance(had, float) and asked is not None and abs(asked - had) < 1e-6 * had):
            raise ConfigurationError(
                f"{name} of attention layer {spec.layer_index} is wrong: got {asked}, expected {had}"
            )
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))  # [tokens, heads, head_dim]
    return core(q, k, v, None).unflatten(0, (query.shape[0], query.shape[2]))
