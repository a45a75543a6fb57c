"""Mixture-of-experts blocks of transformers: recognised by their parts and by running them, and built as one layer."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.experts import ClampedSwiglu
from polyshard.core.weight_sharding import replicated
from polyshard.core.weight_table import rename_in_checkpoints, set_layouts
from polyshard.experts.layer import MixtureOfExperts, SharedExperts, mixture_of_experts
from polyshard.experts.router import Router
from polyshard.transformers.mixture_storage import StoredBlock, stored_block, tensors_of
from polyshard.transformers.replaced.recognize import NotRecognised
from polyshard.transformers.trial.mixture_block import BlockTrial, first_number, tensor_at

_ROUTERS = ("gate", "router")
_PER_TOKEN = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The settings of a recognised block.

    Attributes:
        router: how the block chooses experts.
        router_name: the router's attribute in the block.
        matrix: path of the router's matrix in the block.
        router_bias: path of the bias of the logits; None without one.
        correction: path of the correction bias; None without one.
        correction_shape: its shape in checkpoints, `[experts]` or `[1, experts]`.
        stored: the block's names in checkpoints.
        pair: whether the block returns its output as the first of two.
    """

    hidden_size: int
    expert_size: int
    num_experts: int
    per_token: int
    router: Router
    router_name: str
    matrix: str
    router_bias: str | None
    correction: str | None
    correction_shape: tuple[int, ...]
    shared: SharedExperts | None
    activation: str | ClampedSwiglu
    bias: bool
    stored: StoredBlock
    pair: bool

    def stored_names(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the experts' tensors in checkpoints, for experts that are stored one by one."""
        storage, shape = self.stored.experts, (self.expert_size, self.hidden_size)
        return {
            f"{self.stored.path}.experts.{index}.{name}.weight": shape if name != storage.down else shape[::-1]
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
            storage=self.stored.experts,
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
            router = replace(router, float32_weight=_stays_float32(model, f"{path}.{sizes['matrix']}"))
            stored = stored_block(model, path, module, sizes)
        except NotRecognised as error:
            raise ConfigurationError(
                f"{type(model).__name__} has a mixture of experts that is not recognised ({path} is a "
                f"{type(module).__name__}: {error}). Write its factory (docs/how-to/experts.md)."
            ) from error
        found[path] = Mixture(**sizes, router=router, pair=pair, stored=stored)
    return found


def store_mixtures(model: nn.Module, found: dict[str, Mixture]) -> None:
    """Give the built layers the names that their blocks have in checkpoints: `block_sparse_moe` for Mixtral's `mlp`."""
    for path, mixture in found.items():
        parent, _, child = path.rpartition(".")
        name = mixture.stored.path.rpartition(".")[2]
        if name != child:
            rename_in_checkpoints(model.get_submodule(parent), child, name)
        layer: Any = model.get_submodule(path)
        for inner, stored in mixture.stored.children.items():
            if stored != inner:
                rename_in_checkpoints(layer, inner, stored)
        if mixture.correction is not None:
            own = f"{mixture.router_name}.e_score_correction_bias"
            bias = layer.get_parameter(own).view(mixture.correction_shape)
            layer.matrix.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
            layout = replicated(mixture.correction_shape)
            set_layouts(layer, {own: (mixture.stored.names[mixture.correction], layout)})


def _is_block(module: nn.Module) -> bool:
    """Whether a module is the parent of experts whose weights are stacked."""
    experts: Any = getattr(module, "experts", None)
    return isinstance(experts, nn.Module) and isinstance(getattr(experts, "gate_up_proj", None), nn.Parameter)


def _stays_float32(model: Any, name: str) -> bool:
    """Whether transformers keeps a parameter in float32 in a model of any dtype."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return any(re.search(rf"(^|\.){re.escape(part)}($|\.)", name) for part in kept)


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
    parts = _router_parts(block)
    children, router_name = dict(block.named_children()), parts["router_name"]
    count, hidden = tensor_at(block, parts["matrix"]).shape
    gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
    if gate_up.dim() != 3 or gate_up.shape[0] != count or down.shape[0] != count or hidden not in down.shape[1:]:
        raise NotRecognised(f"its router has {count} outputs, its experts {tuple(gate_up.shape)} weights")
    size = gate_up[0].numel() // hidden // 2
    shared = next((name for name in children if name.startswith("shared_") and name[-5:] != "_gate"), None)
    gated = "shared_expert_gate" in children
    held = {name for name in tensors_of(block) if not name.startswith(("experts.", "shared_expert_gate."))}
    known = {parts[part] for part in ("matrix", "router_bias", "correction")}
    extra = {name for name in held - known if shared is None or not name.startswith(f"{shared}.")}
    extra |= {"shared_expert_gate"} if gated and not shared else set()
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
        **parts,
        "correction_shape": tuple(tensor_at(block, parts["correction"]).shape) if parts["correction"] else (),
        "shared": SharedExperts(size=_shared_size(children[shared]), gated=gated, name=shared) if shared else None,
        "activation": ClampedSwiglu(alpha=float(limits[0]), limit=float(limits[1])) if clamped else "silu",  # pyrefly: ignore  # numbers
        "bias": bias,
    }
    if sizes["per_token"] is None:
        raise NotRecognised("the number of experts per token is unknown")
    router, pair = BlockTrial(block, sizes).router(config)
    return sizes, router, pair


def _router_parts(block: nn.Module) -> dict[str, str | None]:
    """Return the router's attribute, and the paths of its matrix, of its bias and of the correction bias in the block.

    The correction bias is a tensor `[experts]` or `[1, experts]` without gradient, of the router or of the block.
    """
    router = next((name for name in _ROUTERS if name in dict(block.named_children())), None)
    inner = {name: tensor for name, tensor in tensors_of(block).items() if name.startswith(f"{router}.")}
    matrices = [name for name, t in inner.items() if t.dim() == 2 and t.requires_grad and name.endswith(".weight")]
    if router is None or len(matrices) != 1:
        raise NotRecognised("it has no router with one matrix [experts, hidden]")
    own = {name: tensor for name, tensor in tensors_of(block).items() if "." not in name}
    count, bias = inner[matrices[0]].shape[0], matrices[0].removesuffix("weight") + "bias"
    corrections = [
        name
        for name, tensor in (inner | own).items()
        if tuple(tensor.shape) in ((count,), (1, count)) and tensor.is_floating_point() and not tensor.requires_grad
    ]
    return {
        "router_name": router,
        "matrix": matrices[0],
        "router_bias": bias if bias in inner else None,
        "correction": corrections[0] if len(corrections) == 1 else None,
    }


def _shared_size(module: nn.Module) -> int:
    linear = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
    if set(linear) != {"gate_proj", "up_proj", "down_proj"} or any(m.bias is not None for m in linear.values()):
        raise NotRecognised("its shared experts are not a gated MLP of plain linear layers without biases")
    return linear["gate_proj"].out_features
