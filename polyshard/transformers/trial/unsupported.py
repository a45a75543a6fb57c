"""Rejection of unsupported transformers models, by name, before they are built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from polyshard.core.errors import ConfigurationError
from polyshard.core.weight_table import collect_layouts
from polyshard.transformers.mixtures import Mixture, find_mixtures

_EXPERTS = re.compile(r"Experts|MoE|Moe(?!l)|MixtureOfExperts|SparseMLP")
_WRITE = "write its factory (docs/how-to/bring-a-model.md)"


def refuse_unsupported(model: Any, config: Any) -> None:
    """Raise an error for a model with parts that polyshard does not build.

    Args:
        model: transformers' own model, on the meta device.
        config: the config from which it was built, which may describe more than this model.

    Raises:
        ConfigurationError: the model has experts, parts besides a text decoder, weights in buffers, or checkpoints
            whose tensors are not its parameters.
    """
    name = type(model).__name__
    parts = {key for key in getattr(type(config), "sub_configs", {}) if not key.startswith(("attn", "ffn"))}
    if parts or model.config.is_encoder_decoder or type(model.config) is not type(config):
        shown = ", ".join(sorted(parts)) or ("an encoder" if model.config.is_encoder_decoder else "other models")
        raise ConfigurationError(
            f"{type(config).__name__} is not the config of a plain text decoder: it has {shown}. Use the text model's "
            f"own config, or {_WRITE}."
        )
    mixtures = find_mixtures(model)
    family = name.removesuffix("ForCausalLM")  # which may be named after its experts
    others = (path for path, module in model.named_modules() if _has_experts(module, family))
    experts = next((path for path in others if not any(_contains(block, path) for block in mixtures)), None)
    if experts is not None:
        raise ConfigurationError(
            f"{name} has a mixture of experts that is not recognised ({experts} is a "
            f"{type(model.get_submodule(experts)).__name__} without gate_up_proj and down_proj of stacked experts). "
            f"Use a dense model, or {_WRITE}."
        )
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    weights = [
        key
        for key, tensor in model.state_dict().items()
        if key not in parameters and tensor.is_floating_point() and not any(_contains(path, key) for path in mixtures)
    ]
    if weights:
        raise ConfigurationError(
            f"{name} stores {len(weights)} buffers beside its parameters ({weights[0]}), but polyshard only loads and "
            f"saves parameters. To use it, {_WRITE}."
        )
    _refuse_other_storage(model, name, mixtures)


def _has_experts(module: nn.Module, family: str) -> bool:
    return _EXPERTS.search(type(module).__name__.removeprefix(family)) is not None


def _contains(block: str, path: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _refuse_other_storage(model: Any, name: str, mixtures: Mapping[str, Mixture]) -> None:
    """Reject checkpoints that transformers converts on loading, except for a renamed child, and for experts."""
    own: dict[str, torch.Tensor] = model.state_dict()
    children = stored_names_of_children(model)
    expected: dict[str, tuple[int, ...]] = {}
    for block in mixtures.values():
        if block.stored.experts.stacked is None:
            expected |= block.stored_names()
    for key, tensor in own.items():
        path = next((path for path in mixtures if _contains(path, key)), None)
        if path is not None:
            block = mixtures[path]
            inner = key.removeprefix(f"{path}.")
            if block.stored.experts.stacked is None and inner.startswith("experts."):
                continue
            key = f"{block.stored.path}.{block.stored.names.get(inner, inner)}"
        child, dot, rest = key.partition(".")
        expected[children.get(child, child) + dot + rest] = tuple(tensor.shape)
    stored = stored_tensors(model)
    others = sorted(set(stored) ^ set(expected)) or [k for k, t in stored.items() if tuple(t.shape) != expected[k]]
    if others:
        raise ConfigurationError(
            f"{name} stores {len(others)} tensors in another form than its parameters ({others[0]}), and transformers "
            f"converts them when it loads a checkpoint. polyshard does not. To use it, {_WRITE}."
        )


def shared_parameters(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that occurs in several modules."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def refuse_lost_sharing(model: nn.Module, shared: list[list[str]], name: str) -> None:
    """Raise an error if layers that shared a weight no longer do.

    Args:
        model: the model with polyshard's layers.
        shared: the result of `shared_parameters` before the replacement.
        name: name of transformers' class.

    Raises:
        ConfigurationError: each copy would be trained and stored separately.
    """
    owners = {}
    for parameter, entry in collect_layouts(model).items():
        for index, stored in enumerate(entry.checkpoint_names):
            owners[stored] = (parameter, index)
        for tied in entry.tied_names:
            owners[tied] = (parameter, 0)
    for group in shared:
        if len({owners.get(stored) for stored in group} - {None}) > 1:
            raise ConfigurationError(
                f"{name} shares weights between layers ({' and '.join(group[:2])}), which polyshard's layers do not. "
                f"To use it, {_WRITE}."
            )


def stored_names_of_children(model: Any) -> dict[str, str]:
    """Return the checkpoint names of children that are renamed there (`lm_head` of GPT-NeoX is `embed_out`)."""
    stored, found = set(stored_tensors(model)), {}
    for child, module in model.named_children():
        keys = [f"{child}.{key}" for key in module.state_dict()]
        if not keys or stored & set(keys):
            continue
        endings = {key.partition(".")[2] for key in keys}
        candidates = {key.partition(".")[0] for key in stored if key.partition(".")[2] in endings}
        candidates -= {name for name, _ in model.named_children()}
        if len(candidates) == 1:
            found[child] = candidates.pop()
    return found


def stored_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that transformers would write for a model, by their names in checkpoints."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(model.state_dict()))
