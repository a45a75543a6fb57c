"""Mixture-of-experts blocks of transformers: recognised by their parts and by running them, and built as one layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.experts import ClampedSwiglu, ExpertStorage
from polyshard.core.weight_table import rename_in_checkpoints
from polyshard.experts.layer import MixtureOfExperts, SharedExperts, mixture_of_experts
from polyshard.experts.router import Router
from polyshard.transformers.replaced.recognize import NotRecognised
from polyshard.transformers.trial.mixture_block import CORRECTION, BlockTrial, first_number, is_transposed

_ROUTERS = ("gate", "router")
_PER_TOKEN = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The settings of a recognised block.

    Attributes:
        router: how the block chooses experts.
        router_name: the router's attribute in the block.
        stored: the block's path in checkpoints.
        pair: whether the block returns its output as the first of two.
    """

    hidden_size: int
    expert_size: int
    num_experts: int
    per_token: int
    router: Router
    router_name: str
    shared: SharedExperts | None
    activation: str | ClampedSwiglu
    bias: bool
    storage: ExpertStorage
    stored: str
    pair: bool

    def stored_names(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the experts' tensors in checkpoints, for experts that are stored one by one."""
        storage, shape = self.storage, (self.expert_size, self.hidden_size)
        return {
            f"{self.stored}.experts.{index}.{name}.weight": shape if name != storage.down else shape[::-1]
            for index in range(self.num_experts)
            for name in (storage.gate, storage.up, storage.down)
        }

    def build(self, context: ParallelContext) -> MixtureOfExperts:
        """Build the layer. Its checkpoint name is still that of the module; see `store_mixtures`."""
        layer = mixture_of_experts(
            self.hidden_size,
            self.expert_size,
            self.num_experts,
            self.per_token,
            context,
            router=self.router,
            shared=self.shared,
            activation=self.activation,
            bias=self.bias,
            router_name=self.router_name,
            storage=self.storage,
        )
        if self.pair:
            layer.register_forward_hook(lambda module, inputs, output: (output, None))
        return layer


def find_mixtures(model: Any) -> dict[str, Mixture]:
    """Return the mixture-of-experts blocks of a transformers model on the meta device, by their paths.

    Raises:
        ConfigurationError: a block is not recognised; the error has the reason.
    """
    found: dict[str, Mixture] = {}
    seen: dict[str, tuple[Any, ...]] = {}
    for path, module in model.named_modules():
        if not _is_block(module):
            continue
        try:
            key = _identity(module)
            if key not in seen:
                seen[key] = _recognised(module, model.config)
            sizes, router, pair = seen[key]
            storage, stored = _storage(model, path, module)
        except NotRecognised as error:
            raise ConfigurationError(
                f"{type(model).__name__} has a mixture of experts that is not recognised ({path} is a "
                f"{type(module).__name__}: {error}). Write its factory (docs/how-to/experts.md)."
            ) from error
        found[path] = Mixture(**sizes, router=router, pair=pair, storage=storage, stored=stored)
    return found


def store_mixtures(model: nn.Module, found: dict[str, Mixture]) -> None:
    """Give the built layers the names that their blocks have in checkpoints: `block_sparse_moe` for Mixtral's `mlp`."""
    for path, mixture in found.items():
        parent, _, child = path.rpartition(".")
        name = mixture.stored.rpartition(".")[2]
        if name != child:
            rename_in_checkpoints(model.get_submodule(parent), child, name)


def _is_block(module: nn.Module) -> bool:
    """Whether a module is the parent of experts whose weights are stacked."""
    experts: Any = getattr(module, "experts", None)
    return isinstance(experts, nn.Module) and isinstance(getattr(experts, "gate_up_proj", None), nn.Parameter)


def _identity(block: nn.Module) -> str:
    """Return a text that is equal for blocks of equal structure and settings."""
    parts = []
    for name, module in block.named_modules():
        shapes = [tuple(weight.shape) for weight in (*module.parameters(False), *module.buffers(False))]
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and "layer" not in k}
        parts.append(f"{name} {type(module).__qualname__} {shapes} {plain}")
    return "; ".join(parts)


def _recognised(block: Any, config: Any) -> tuple[dict[str, Any], Router, bool]:
    """Return sizes and options, the router, and whether the block returns a pair."""
    children = dict(block.named_children())
    router_name = next((name for name in _ROUTERS if name in children), None)
    matrix = getattr(children.get(router_name or ""), "weight", None)
    if router_name is None or not isinstance(matrix, nn.Parameter) or matrix.dim() != 2:
        raise NotRecognised("it has no router with one matrix [experts, hidden]")
    count, hidden = matrix.shape
    gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
    if gate_up.dim() != 3 or gate_up.shape[0] != count or down.shape[0] != count or hidden not in down.shape[1:]:
        raise NotRecognised(f"its router has {count} outputs, its experts {tuple(gate_up.shape)} weights")
    size = gate_up[0].numel() // hidden // 2
    shared = next((name for name in children if name.startswith("shared_expert") and name[-5:] != "_gate"), None)
    gated = "shared_expert_gate" in children
    unknown = set(children) - {"experts", router_name, shared, "shared_expert_gate"}
    own = {name for name, _ in block.named_parameters(recurse=False)} | {
        name for name, _ in block.named_buffers(recurse=False)
    }
    held = {name for name, _ in (*children[router_name].named_parameters(), *children[router_name].named_buffers())}
    extra = (
        unknown
        | own
        | (held - {"weight", "bias", CORRECTION})
        | ({"shared_expert_gate"} if gated and not shared else set())
    )
    if extra:
        raise NotRecognised(f"it has parts of unknown meaning: {', '.join(sorted(extra))}")
    experts_hold = {name for name, _ in block.experts.named_parameters()}
    bias = "gate_up_proj_bias" in experts_hold
    if experts_hold != {"gate_up_proj", "down_proj"} | ({"gate_up_proj_bias", "down_proj_bias"} if bias else set()):
        raise NotRecognised(f"its experts have the parameters {', '.join(sorted(experts_hold))}")
    limits = getattr(block.experts, "alpha", None), getattr(block.experts, "limit", None)
    clamped = all(isinstance(value, (int, float)) for value in limits)
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "expert_size": size,
        "num_experts": count,
        "per_token": first_number(_PER_TOKEN, children[router_name], block, config),
        "router_name": router_name,
        "shared": SharedExperts(size=_shared_size(children[shared]), gated=gated, name=shared) if shared else None,
        "activation": ClampedSwiglu(alpha=float(limits[0]), limit=float(limits[1])) if clamped else "silu",  # pyrefly: ignore  # numbers
        "bias": bias,
    }
    if sizes["per_token"] is None:
        raise NotRecognised("the number of experts per token is unknown")
    router, pair = BlockTrial(block, sizes).router(config)
    return sizes, router, pair


def _shared_size(module: nn.Module) -> int:
    linear = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
    if set(linear) != {"gate_proj", "up_proj", "down_proj"} or any(m.bias is not None for m in linear.values()):
        raise NotRecognised("its shared experts are not a gated MLP of plain linear layers without biases")
    return linear["gate_proj"].out_features


def _storage(model: Any, path: str, block: Any) -> tuple[ExpertStorage, str]:
    """Return how checkpoints store the experts, and the block's path in them.

    transformers converts small experts with marked values, so that no name is taken by its looks.
    """
    from transformers.core_model_loading import revert_weight_conversion

    experts = block.experts
    count = experts.gate_up_proj.shape[0]
    hidden = next(getattr(block, name) for name in _ROUTERS if hasattr(block, name)).weight.shape[1]
    if is_transposed(experts, hidden):
        interleaved = not getattr(experts, "is_concatenated", True)
        return ExpertStorage(stacked="gate_up_proj", down="down_proj", interleaved=interleaved), path
    gate_up = torch.arange(2.0 * count, device="cpu").view(count, 2, 1)
    down = torch.arange(-1.0, -count - 1, -1, device="cpu").view(count, 1, 1)
    names = f"{path}.experts.gate_up_proj", f"{path}.experts.down_proj"
    try:
        stored = revert_weight_conversion(model, dict(zip(names, (gate_up, down))))
    except Exception as error:  # transformers' code may raise anything
        raise NotRecognised(f"the storage of its experts is unknown: {type(error).__name__}: {error}") from error
    if set(stored) & set(names):
        raise NotRecognised("checkpoints store its experts stacked as [experts, 2 * size, hidden]")
    values = {float(tensor): name for name, tensor in stored.items() if tensor.numel() == 1}
    parts: dict[str, set[str]] = {"gate": set(), "up": set(), "down": set()}
    prefixes = set()
    for index in range(count):
        for part, value in (("gate", 2.0 * index), ("up", 2.0 * index + 1), ("down", -1.0 - index)):
            match = re.fullmatch(rf"(.+)\.experts\.{index}\.(\w+)\.weight", values.get(value, ""))
            if match is None:
                raise NotRecognised(f"checkpoints store its experts under other names: {min(stored)}")
            prefixes.add(match[1])
            parts[part].add(match[2])
    (stored_path,) = prefixes if len(prefixes) == 1 else ("",)
    if any(len(found) > 1 for found in parts.values()) or stored_path.rpartition(".")[0] != path.rpartition(".")[0]:
        raise NotRecognised(f"checkpoints store its experts under other names: {min(stored)}")
    gate, up, down_name = (next(iter(parts[part])) for part in ("gate", "up", "down"))
    return ExpertStorage(gate=gate, up=up, down=down_name), stored_path
