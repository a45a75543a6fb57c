"""Attention of a transformers model: replaced if it is recognised, and otherwise connected to the engine's cache."""

from __future__ import annotations

from typing import Any

from torch import nn

from polyshard.core.attention import AttentionSpec
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.transformers.replaced.interface import IMPLEMENTATION, register
from polyshard.transformers.replaced.observe import Observed, observe
from polyshard.transformers.replaced.surgery import replace_attention


def exchange_attention(model: Any, context: ParallelContext) -> None:
    """Replace the attention that is recognised; in a server, the rest calls the engine through transformers' interface.

    Args:
        model: a transformers model on the meta device.
        context: the parallel context.

    Raises:
        ConfigurationError: attention is not recognised at a tensor-parallel size above 1, or does not use transformers'
            attention interface.
    """
    try:
        kept = replace_attention(model, context, None, False, compare_model=False).kept
    except ConfigurationError:  # there are no projections with the usual names
        kept = ()
    config = model.config.get_text_config()
    rest = {
        name: (module, observe(module, config.hidden_size))
        for name, module in model.named_modules()
        if _is_attention(module)
    }
    if not rest:
        return
    if context.get_tensor_parallel_world_size() > 1:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in kept[:1]) or "its projections have other names"
        raise ConfigurationError(
            f"the attention modules of {type(model).__name__} are not recognised ({reasons}), so it is only supported "
            "at tensor-parallel 1"
        )
    apart = next((name for name, (_, seen) in rest.items() if seen is None), None)
    if apart is not None or not getattr(model, "_supports_attention_backend", False):
        raise ConfigurationError(
            f"{type(model).__name__} does not use transformers' attention interface"
            + ("" if apart is None else f" in {apart} ({type(rest[apart][0]).__name__})")
            + ". Write its factory (docs/how-to/bring-a-model.md)."
        )
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    factory = context.attention
    if factory is not None:
        for module, seen in rest.values():
            assert seen is not None
            sinks = getattr(module, "sinks", None) if seen.sinks else None
            module.polyshard_core = factory(_spec(module, seen), sinks)


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Attention" in name and name != "ReplacedAttention" and isinstance(getattr(module, "layer_idx", None), int)


def _spec(module: Any, seen: Observed) -> AttentionSpec:
    """Return the attention spec for the arguments that the module passes to attention."""
    return AttentionSpec(
        num_heads=seen.num_heads,
        num_kv_heads=seen.num_kv_heads,
        head_dim=seen.head_dim,
        value_dim=seen.value_dim,
        scale=seen.scale,
        causal=bool(getattr(module, "is_causal", True)),
        sliding_window=seen.sliding_window,
        softcap=seen.softcap,
        sinks=seen.sinks,
        layer_index=module.layer_idx,
    )
