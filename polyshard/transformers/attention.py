"""Attention of a transformers model: replaced if it is recognised, and otherwise connected to the engine's cache."""

from __future__ import annotations

import contextlib
from typing import Any

from polyshard.core.attention import AttentionSpec
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.exact_identity import exact_kernel
from polyshard.transformers.kept_attention import is_attention, shard_by_heads
from polyshard.transformers.replaced.interface import IMPLEMENTATION, register
from polyshard.transformers.replaced.observe import Observed, observe
from polyshard.transformers.replaced.surgery import replace_attention


def exchange_attention(model: Any, context: ParallelContext, by_heads: bool) -> tuple[str, ...]:
    """Replace the attention that is recognised; in a server, the rest calls the engine through transformers' interface.

    Args:
        model: a transformers model on the meta device.
        context: the parallel context.
        by_heads: at a tensor-parallel size above 1, shard the rest by heads; otherwise every rank computes all heads.

    Returns:
        The paths of the modules that are replicated.

    Raises:
        ConfigurationError: attention does not use transformers' attention interface.
    """
    with contextlib.suppress(ConfigurationError):  # there are no projections with the usual names
        replace_attention(model, context, None, False, compare_model=False)
    config = model.config.get_text_config()
    rest = {
        name: (module, observe(module, config.hidden_size))
        for name, module in model.named_modules()
        if is_attention(module)
    }
    if not rest:
        return ()
    apart = next((name for name, (_, seen) in rest.items() if seen is None), None)
    if apart is not None or not getattr(model, "_supports_attention_backend", False):
        raise ConfigurationError(
            f"{type(model).__name__} does not use transformers' attention interface"
            + ("" if apart is None else f" in {apart} ({type(rest[apart][0]).__name__})")
            + ". Write its factory (docs/how-to/bring-a-model.md)."
        )
    sharded = context.get_tensor_parallel_world_size() > 1
    if sharded and by_heads:
        rest = {name: (module, shard_by_heads(model, name, seen, context)) for name, (module, seen) in rest.items()}  # pyrefly: ignore  # none is None
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    kernel = exact_kernel(context, None)
    for module, _ in rest.values():
        module.polyshard_kernel = kernel
    factory = context.attention
    if factory is not None:
        for module, seen in rest.values():
            assert seen is not None
            sinks = getattr(module, "sinks", None) if seen.sinks else None
            module.polyshard_core = factory(_spec(module, seen), sinks)
    return tuple(rest) if sharded and not by_heads else ()


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
