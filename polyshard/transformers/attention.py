"""Attention of a transformers model: exchanged where it is recognised, else given the engine's cache as it stands."""

from __future__ import annotations

from typing import Any

from torch import nn

from polyshard.core.attention import AttentionSpec
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.replace import replace_with_trainable_attention
from polyshard.replace.interface import IMPLEMENTATION, register


def exchange_attention(model: Any, context: ParallelContext) -> None:
    """Exchange what is recognised; in a server, the rest calls the engine's attention by transformers' interface.

    Args:
        model: on the meta device.
        context: where this process stands.

    Raises:
        ConfigurationError: attention that is not recognised, at a tensor-parallel size above 1, or that does not go
            through transformers' attention interface.
    """
    try:
        kept = replace_with_trainable_attention(model, context, strict=False).kept
    except ConfigurationError:  # no projections under their usual names
        kept = ()
    rest = [module for module in model.modules() if _calls_interface(module)]
    if not rest:
        return
    if context.get_tensor_parallel_world_size() > 1:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in kept[:2]) or "its projections have other names"
        raise ConfigurationError(
            f"{type(model).__name__}: {len(rest)} attention modules are not recognised ({reasons}), and run at "
            "tensor-parallel 1 alone"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigurationError(
            f"{type(model).__name__} does not compute attention by transformers' attention interface"
        )
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    factory = getattr(context, "attention", None)
    if factory is not None:
        for module in rest:
            module.polyshard_core = factory(_spec(module, model.config.get_text_config()))


def _calls_interface(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Attention" in name and name != "ReplacedAttention" and isinstance(getattr(module, "layer_idx", None), int)


def _spec(module: Any, config: Any) -> AttentionSpec:
    """From the config, as transformers' caches read it; what the module then passes is compared with it."""
    heads = config.num_attention_heads
    head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None) or config.hidden_size // heads
    types = getattr(config, "layer_types", None)
    slides = types is None or types[module.layer_idx] == "sliding_attention"
    window = getattr(module, "sliding_window", None) or (getattr(config, "sliding_window", None) if slides else None)
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        scale=float(getattr(module, "scaling", None) or head_dim**-0.5),
        sliding_window=window,
        softcap=getattr(module, "attn_logit_softcapping", None),
        layer_index=module.layer_idx,
    )
