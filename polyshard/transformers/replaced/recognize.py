"""Recognition of attention modules by their projections and settings, with reasons for those that are unsupported."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyshard.transformers.replaced.observe import Observed, observe

_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_FUSED = {"qkv_proj", "o_proj"}
_OTHERS = {"q_norm", "k_norm", "rotary_emb"}


class NotRecognised(Exception):
    """The reason why a module that looks like attention cannot be replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The settings of a recognised attention module.

    Attributes:
        projections: linear layers `[features, hidden]` of query, key and value, or the fused projection.
        rotary: whether position embeddings apply.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    causal: bool
    dropout: float
    sliding_window: int | None
    softcap: float | None
    projections: tuple[nn.Linear, ...]
    output: nn.Linear
    norms: tuple[nn.Module, nn.Module] | None
    sinks: torch.Tensor | None
    rotary: bool
    layer_index: int | None


def looks_like_attention(module: nn.Module) -> bool:
    """Return whether a module has attention projections with the usual names."""
    children = {name for name, _ in module.named_children()}
    return children >= _PROJECTIONS or children >= _FUSED


def recognise(module: nn.Module) -> Found:
    """Return the settings of an attention module.

    Raises:
        NotRecognised: it has parts or settings of unknown meaning.
    """
    children = dict(module.named_children())
    wanted = _PROJECTIONS if set(children) >= _PROJECTIONS else _FUSED
    unknown = sorted(set(children) - wanted - _OTHERS)
    own = sorted(name for name, _ in module.named_parameters(recurse=False))
    if unknown or set(own) - {"sinks"}:
        raise NotRecognised(f"it has parts of unknown meaning: {', '.join(unknown + [n for n in own if n != 'sinks'])}")
    names = ("q_proj", "k_proj", "v_proj") if wanted is _PROJECTIONS else ("qkv_proj",)
    *projections, output = (_linear(name, children[name]) for name in (*names, "o_proj"))
    biased = {layer.bias is not None for layer in projections}
    if len(biased) > 1:
        raise NotRecognised("only some of its query, key and value projections have a bias")
    config: Any = getattr(module, "config", None)
    head_dim = _setting(module, config, "head_dim")
    if head_dim is None:
        raise NotRecognised("its head_dim is unknown")
    num_heads = output.in_features // head_dim
    if len(projections) == 1:
        num_kv_heads = (projections[0].out_features // head_dim - num_heads) // 2
    else:
        num_kv_heads = projections[1].out_features // head_dim
        if (
            projections[0].out_features != num_heads * head_dim
            or projections[2].out_features != num_kv_heads * head_dim
        ):
            raise NotRecognised("its query is gated, or its values differ from its keys in size")
    norms = None
    if "q_norm" in children:
        norms = (children["q_norm"], children["k_norm"])
        for norm in norms:
            sizes = {parameter.numel() for parameter in norm.parameters()}
            if sizes - {head_dim}:
                raise NotRecognised(
                    f"its query norm has {max(sizes)} weights, expected {head_dim}, one for each channel of a head"
                )
    if getattr(config, "clip_qkv", None) or getattr(config, "qkv_clip", None):
        raise NotRecognised("it clips queries, keys and values")
    if _neighbouring_pairs(module):
        raise NotRecognised("its rotary embedding rotates neighbouring pairs, not halves")
    hidden_size = projections[0].in_features
    if output.out_features != hidden_size:
        raise NotRecognised(f"its input has {hidden_size} features, its output {output.out_features}")
    seen = observe(module, hidden_size)
    if seen is None:  # not a transformers module, or one that does not use the interface: read its attributes
        seen = _by_attributes(module, config, num_heads, num_kv_heads, head_dim)
    if (seen.num_heads, seen.num_kv_heads, seen.head_dim, seen.value_dim) != (
        num_heads,
        num_kv_heads,
        head_dim,
        head_dim,
    ):
        raise NotRecognised(
            f"it passes {seen.num_heads} query and {seen.num_kv_heads} key heads of size {seen.head_dim} and "
            f"{seen.value_dim} to attention, but its projections have {num_heads} and {num_kv_heads} of size {head_dim}"
        )
    if seen.other:
        raise NotRecognised(f"it passes {', '.join(seen.other)} to attention")
    sinks = getattr(module, "sinks", None)
    if seen.sinks != (sinks is not None):
        raise NotRecognised("its sinks differ from those it passes to attention")
    dropout = getattr(module, "attention_dropout", 0.0)
    return Found(
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=seen.scale,
        causal=bool(getattr(module, "is_causal", True)),
        dropout=float(dropout if isinstance(dropout, (int, float)) else 0.0),
        sliding_window=seen.sliding_window,
        softcap=seen.softcap,
        projections=tuple(projections),
        output=output,
        norms=norms,
        sinks=sinks,
        rotary=seen.rotary,
        layer_index=getattr(module, "layer_idx", None),
    )


def _by_attributes(module: nn.Module, config: Any, num_heads: int, num_kv_heads: int, head_dim: int) -> Observed:
    softcap = getattr(module, "attn_logit_softcapping", None)
    return Observed(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        scale=float(getattr(module, "scaling", None) or head_dim**-0.5),
        sliding_window=_window(module, config),
        softcap=None if softcap is None else float(softcap),
        sinks=getattr(module, "sinks", None) is not None,
        rotary=bool(getattr(module, "use_rope", True)),
        other=(),
    )


def _linear(name: str, module: nn.Module) -> nn.Linear:
    """Return the layer if its class is exactly nn.Linear; a subclass's additions (quantization, LoRA) would be lost."""
    if type(module) is not nn.Linear:
        raise NotRecognised(f"{name} is a {type(module).__name__}, not a plain torch.nn.Linear")
    return module


def _setting(module: nn.Module, config: Any, name: str) -> Any:
    return getattr(module, name, None) or getattr(config, name, None)


def _window(module: nn.Module, config: Any) -> int | None:
    """Return the layer's own window; older models of transformers read it from the config."""
    own: Any = getattr(module, "sliding_window", "unsaid")
    if own != "unsaid":
        return own
    types = getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return None
    if types is not None and index is not None:
        return window if types[index] == "sliding_attention" else None
    return window


def _neighbouring_pairs(module: nn.Module) -> bool:
    """Return whether the function `rotate_half` in the module's source file, if any, rotates neighbouring pairs."""
    rotate = getattr(sys.modules.get(type(module).__module__), "rotate_half", None)
    if rotate is None:
        return False
    return not torch.equal(rotate(torch.tensor([[1.0, 2.0, 3.0, 4.0]])), torch.tensor([[-3.0, -4.0, 1.0, 2.0]]))
