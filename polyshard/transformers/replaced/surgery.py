"""`replace_with_trainable_attention`: replacement of attention modules in a model, with a comparison of the outputs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.weight_table import collect_layouts, copy_into_shard
from polyshard.transformers.replaced.attention import ReplacedAttention
from polyshard.transformers.replaced.observe import implementation
from polyshard.transformers.replaced.recognize import Found, NotRecognised, looks_like_attention, recognise
from polyshard.transformers.replaced.requirement import TRANSFORMERS

logger = logging.getLogger(__name__)

_TOKENS = 12  # length of the input on which both modules are compared


@dataclass(frozen=True, slots=True)
class Kept:
    """An attention module that was not replaced, and the reason.

    Examples:
        >>> Kept("layers.0.attn", "it clips queries, keys and values").reason
        'it clips queries, keys and values'
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Replacement:
    """The result of `replace_with_trainable_attention`.

    Attributes:
        replaced: names of the modules that were replaced.
        kept: modules that look like attention but were not replaced, with reasons.

    Examples:
        >>> Replacement(replaced=("layers.0.attn",), kept=()).replaced
        ('layers.0.attn',)
    """

    replaced: tuple[str, ...]
    kept: tuple[Kept, ...]


def replace_with_trainable_attention(
    model: nn.Module,
    parallel_context: ParallelContext | None = None,
    *,
    kernel: str | None = None,
    strict: bool = True,
) -> Replacement:
    """Replace every recognised attention module of `model`, in place.

    A module is recognised by its projections (`q_proj`, `k_proj`, `v_proj` or `qkv_proj`, with `o_proj`), whatever its
    class. Weights are copied and head norms are kept. Each new module is compared with the old one on a random input
    before it replaces it. For a transformers model, a trial model of the same configuration is compared as well, on
    rows and packed sequences, and masks are requested in the form that flash kernels support.

    Args:
        model: a model on one device with its weights loaded. On the meta device nothing is copied or compared, and the
            new modules are created on the context's device.
        parallel_context: the parallel context; attention is sharded over its tensor axis.
        kernel: name of a kernel to use for every call.
        strict: raise an error if a module that looks like attention cannot be replaced; otherwise keep it and log a
            warning.

    Returns:
        The modules that were replaced, and those that were kept with the reason.

    Raises:
        ConfigurationError: no module looks like attention, a module cannot be replaced (with `strict`), or the model's
            output would change. The model is then unchanged.

    Examples:
        >>> import transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = transformers.LlamaForCausalLM(config)
        >>> replace_with_trainable_attention(model).replaced
        ('model.layers.0.self_attn',)
    """
    if type(model).__module__.startswith("transformers."):
        TRANSFORMERS.require()
    return replace_attention(model, parallel_context, kernel, strict, compare_model=True)


def replace_attention(
    model: nn.Module, parallel_context: ParallelContext | None, kernel: str | None, strict: bool, *, compare_model: bool
) -> Replacement:
    """Implement `replace_with_trainable_attention`; the model as a whole is only compared if `compare_model` is set."""
    candidates = {name: module for name, module in model.named_modules() if looks_like_attention(module)}
    if not candidates:
        raise ConfigurationError(
            f"{type(model).__name__} has no attention module: expected one with q_proj, k_proj, v_proj and o_proj, or "
            "with qkv_proj and o_proj"
        )
    made: dict[str, ReplacedAttention] = {}
    kept: list[Kept] = []
    for name, module in candidates.items():
        try:
            made[name] = _replacement(module, parallel_context, kernel)
        except NotRecognised as error:
            kept.append(Kept(name, f"{type(module).__name__}: {error}"))
    if any(parameter.is_meta for parameter in model.parameters()):  # there is nothing to compare
        doubled = _doubles_rotary(model)
        for new in made.values():
            new.rotary_doubled = doubled
    if kept and strict:
        shown = "; ".join(f"{item.name}: {item.reason}" for item in kept[:4])
        raise ConfigurationError(
            f"{len(kept)} of {len(candidates)} attention modules cannot be replaced: {shown}. Nothing was changed; "
            "pass strict=False to replace the others."
        )
    if compare_model and made:
        _try_model(model, strict)
    for name, module in made.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    if kept:
        logger.warning(
            "%d of %d attention modules were not replaced: %s: %s",
            len(kept),
            len(candidates),
            kept[0].name,
            kept[0].reason,
        )
    choose: Any = getattr(model, "set_attn_implementation", None)
    if made and choose is not None:
        from polyshard.transformers.replaced.interface import IMPLEMENTATION, register

        register()
        choose(IMPLEMENTATION)
    return Replacement(tuple(made), tuple(kept))


def _doubles_rotary(model: nn.Module) -> bool:
    """Return whether a model on the meta device repeats cosines for both halves of a head, as all but gpt-oss do."""
    for module in model.modules():
        frequencies = getattr(module, "inv_freq", None)
        if isinstance(frequencies, torch.Tensor) and frequencies.is_meta and "Rotary" in type(module).__name__:
            try:
                cos, _ = module(frequencies.new_empty(1, 1, 1), torch.zeros(1, 1, dtype=torch.long, device="meta"))
            except Exception:  # transformers' code may raise anything, as for other arguments
                continue
            return cos.shape[-1] != frequencies.numel()
    return True


def _try_model(model: Any, strict: bool) -> None:
    """Compare full models of a transformers config; their attention modules have been compared before."""
    config = getattr(model, "config", None)
    parameters = list(model.parameters())
    if not hasattr(config, "get_text_config") or any(parameter.is_meta for parameter in parameters):
        return
    from polyshard.transformers.trial.trial import try_replacement

    config = config.get_text_config()
    try_replacement(
        config,
        sum(parameter.numel() for parameter in parameters),
        lambda small: replace_attention(small, None, None, strict, compare_model=False),
    )


def _replacement(module: nn.Module, context: ParallelContext | None, kernel: str | None) -> ReplacedAttention:
    found = recognise(module)
    new = ReplacedAttention(found, context, kernel)
    new.train(module.training)
    if found.output.weight.is_meta:
        return new  # weights are loaded later
    rank = 0 if context is None else context.get_tensor_parallel_rank()
    size = 1 if context is None else context.get_tensor_parallel_world_size()
    sources: dict[str, torch.Tensor] = {
        f"{name}.{leaf}": parameter
        for name, layer in (*zip(("q_proj", "k_proj", "v_proj"), found.projections), ("o_proj", found.output))
        for leaf, parameter in layer.named_parameters()
    }
    if len(found.projections) == 1:
        sources |= {f"qkv_proj.{leaf}": parameter for leaf, parameter in found.projections[0].named_parameters()}
    if found.sinks is not None:
        sources["sinks"] = found.sinks
    parameters = dict(new.named_parameters())
    for entry in collect_layouts(new).values():
        if entry.name.startswith(("q_norm", "k_norm")):
            continue
        for index, name in enumerate(entry.checkpoint_names):
            count = len(entry.checkpoint_names)
            copy_into_shard(parameters[entry.parameter], entry.layout, count, index, sources[name], rank, size)
        parameters[entry.parameter].requires_grad_(sources[entry.checkpoint_names[0]].requires_grad)
    if size == 1 and new.core is None and hasattr(module, "config"):
        try:
            _compare(module, new, found)
        except NotRecognised as first:
            new.rotary_doubled = False
            try:
                _compare(module, new, found)
            except NotRecognised:
                raise first from None
    return new


@torch.no_grad()
def _compare(old: nn.Module, new: ReplacedAttention, found: Found) -> None:
    """Run both modules on the same input, the old one with transformers' "eager" attention and an explicit mask."""
    config: Any = old.config
    like = found.output.weight
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(like)

    hidden = draw(2, _TOKENS, found.hidden_size)
    turned = int(found.head_dim * (getattr(config, "partial_rotary_factor", None) or 1.0))
    angles = draw(2, _TOKENS, turned // 2)
    rotary = tuple(torch.cat([t] * (2 if new.rotary_doubled else 1), dim=-1) for t in (angles.cos(), angles.sin()))
    apart = torch.arange(_TOKENS, device=like.device)[:, None] - torch.arange(_TOKENS, device=like.device)
    masked = apart < 0 if found.causal else torch.zeros_like(apart, dtype=torch.bool)
    if found.sliding_window is not None:
        masked = masked | (apart.abs() >= found.sliding_window)
    mask = torch.zeros(apart.shape, device=like.device, dtype=like.dtype)
    mask.masked_fill_(masked, torch.finfo(like.dtype).min)
    training = old.training
    try:
        with implementation(config, "eager"):
            expected = old.eval()(hidden, position_embeddings=rotary, attention_mask=mask.expand(2, 1, -1, -1))[0]
        got = new.eval()(hidden, position_embeddings=rotary)[0]
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise NotRecognised(f"it cannot be compared: {type(error).__name__}: {error}") from error
    finally:
        old.train(training)
        new.train(training)
    apart_by, size = float((got - expected).abs().max()), float(expected.abs().max())
    eps = max(torch.finfo(like.dtype).eps, torch.finfo(torch.float32).eps)  # eager softmax is float32 even for float64
    if apart_by > 64 * eps * size:
        raise NotRecognised(f"outputs differ by up to {apart_by:.2e}; the largest is {size:.2e}")
