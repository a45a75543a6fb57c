"""Replacement of linear layers, gated MLPs and norms according to transformers' own tensor-parallel plan."""

from __future__ import annotations

import copy
import fnmatch
import logging
from collections.abc import Collection, Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.layers.linear import column_parallel, row_parallel
from polyshard.layers.norm import rms_norm
from polyshard.transformers.gated import gated_mlp
from polyshard.transformers.mixtures import Mixture

logger = logging.getLogger(__name__)

_REPLICATED = ("colwise_gather_output", "rowwise_split_input", "replicated_with_grad_allreduce")  # right if replicated


def exchange_layers(
    model: Any, context: ParallelContext, mixtures: Mapping[str, Mixture], replicated: Collection[str] = ()
) -> None:
    """Replace mixtures of experts, gated MLPs, norms and linear layers by parallel ones.

    Args:
        model: a transformers model on the meta device.
        context: the parallel context.
        mixtures: the result of `find_mixtures`.
        replicated: paths of the modules whose linear layers stay replicated.

    Raises:
        ConfigurationError: at a tensor-parallel size above 1, there is no plan, or it has an unsupported entry.
    """
    size = context.get_tensor_parallel_world_size()
    plan: dict[str, str] = dict(model.tp_plan)
    if size > 1 and not plan:
        raise ConfigurationError(
            f"{type(model).__name__} has no tensor-parallel plan in transformers. Run it at tensor-parallel 1."
        )
    plain: dict[type, bool] = {}  # whether a class of norms is a plain RMSNorm
    left: list[str] = []

    def exchanged(path: str, module: Any) -> nn.Module | None:
        if path in mixtures:
            return mixtures[path].build(context)
        mlp = gated_mlp(module, context)
        if mlp is not None:
            return mlp
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or not weight.is_meta or module is model.get_output_embeddings():
            return None
        if "RMSNorm" in type(module).__name__ and plain.setdefault(type(module), is_plain_norm(module)):
            return rms_norm(weight.numel(), context, eps=_eps(module))
        if type(module) is not nn.Linear:
            return None
        style = None if _inside(path, replicated) else style_of(plan, path)
        if style in ("colwise", "rowwise") or size == 1:
            make = row_parallel if style == "rowwise" else column_parallel
            return make(module.in_features, module.out_features, context, bias=module.bias is not None)
        left.append(path)
        return None

    def walk(prefix: str, parent: nn.Module) -> None:
        for name, child in parent.named_children():
            new = exchanged(prefix + name, child)
            if new is None:
                walk(f"{prefix}{name}.", child)
            else:
                setattr(parent, name, new)

    walk("", model)
    if size == 1:
        return
    unknown = sorted(set(plan.values()) - {"colwise", "rowwise", *_REPLICATED, "embedding_rowwise"})
    others = (path for path, _ in model.named_modules() if not _inside(path, (*mixtures, *replicated)))
    held = [path for path in others if style_of(plan, path) in unknown]
    if held:
        raise ConfigurationError(
            f"{type(model).__name__}: the plan of {held[0]} is unsupported ({', '.join(unknown)}). Run the model at "
            "tensor-parallel 1."
        )
    if left and context.get_tensor_parallel_rank() == 0:
        logger.warning("%d linear layers are replicated on every rank: %s", len(left), ", ".join(left[:4]))


def replicate_exactly(model: nn.Module, context: ParallelContext) -> None:
    """In exact mode, replace the linear layers that stay replicated in transformers' own modules by exact ones."""
    if context.exact is None:
        return
    for module in [module for module in model.modules() if type(module).__module__.startswith("transformers.")]:
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, context.exact.replicated_linear(child, context))


def is_plain_norm(module: nn.Module) -> bool:
    """Return whether a norm only multiplies by its weight, found by running it (Gemma's adds 1 to the weight)."""
    if [name for name, _ in module.named_parameters()] != ["weight"] or len(signature(module.forward).parameters) != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.device("cpu"):
        probe: Any = copy.deepcopy(module).to_empty(device="cpu").float()
        probe.weight.copy_(torch.randn(probe.weight.shape, generator=generator, dtype=torch.float32))
        x = torch.randn(3, probe.weight.numel(), generator=generator, dtype=torch.float32)
        for scale in (1.0, 1e-3):  # for small inputs the result depends on eps
            wanted = F.rms_norm(scale * x, (x.shape[-1],), probe.weight, _eps(module))
            try:
                if not torch.allclose(probe(scale * x), wanted, rtol=1e-5, atol=1e-5):
                    return False
            except (RuntimeError, TypeError, ValueError, AttributeError):
                return False
    return True


def _eps(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", None) or getattr(module, "eps", None) or 1e-6)


def _inside(path: str, blocks: Collection[str]) -> bool:
    """Whether a module is one of some modules, or inside one."""
    return any(path == block or path.startswith(f"{block}.") for block in blocks)


def style_of(plan: dict[str, str], path: str) -> str | None:
    """Return the plan's entry for a module; a star in the plan stands for a layer number."""
    return next((style for pattern, style in plan.items() if fnmatch.fnmatchcase(path, pattern)), None)
