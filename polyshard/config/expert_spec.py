"""The experts of a Llama-like decoder with a mixture of experts, as described by its config.json.

Missing fields take the defaults of the family's class in transformers, as in `DecoderSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyshard.config.family_defaults import number, size

EXPERT_FAMILIES = ("deepseek_v3", "dots1", "glm4_moe", "mixtral", "qwen2_moe", "qwen3_moe")
_QWEN = {"qwen2_moe": (60, 4, 1408), "qwen3_moe": (128, 8, 768)}  # experts, experts per token, width
# Default values of config.json's fields, for families with the router of DeepSeek-V3. None: the field is required.
_DEEPSEEK: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v3": {
        **{"n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1},
        **{"first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "norm_topk_prob": True},
        "routed_scaling_factor": 2.5,
    },
    "dots1": {
        **{"n_routed_experts": None, "num_experts_per_tok": None, "moe_intermediate_size": 1408},
        **{"n_shared_experts": None, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
        **{"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    },
    "glm4_moe": {
        **{"n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408, "n_shared_experts": 1},
        **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True},
        "routed_scaling_factor": 1.0,
    },
}
_GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSpec:
    """The dense MLP that every token passes beside its experts.

    Attributes:
        width: width of the MLP; of several shared experts, the sum of their widths.
        name: name of the MLP in its block.
        gate: name of the weight `[1, hidden]` whose sigmoid multiplies the output; None without one.
    """

    width: int
    name: str
    gate: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """The experts of a decoder, and their names in Hugging Face's files.

    Attributes:
        count: number of experts in a layer.
        top_k: number of experts for each token.
        intermediate: width of an expert.
        normalized: whether the weights of the chosen experts are divided by their sum.
        sparse: for each layer, whether it has experts.
        block: name of the module with router and experts within a layer.
        projections: names of an expert's gate, up and down projection.
        score: `softmax` over all experts, or `sigmoid` of each logit. Routers with a sigmoid have a correction bias,
            which is added to the scores for the choice.
        scale: factor of all weights.
        groups: number of groups of experts, and in how many of them experts are chosen; (1, 1) if the choice is free.
        shared: the shared experts; None without any.
    """

    count: int
    top_k: int
    intermediate: int
    normalized: bool
    sparse: tuple[bool, ...]
    block: str = "mlp"
    projections: tuple[str, str, str] = _GATE_UP_DOWN
    score: str = "softmax"
    scale: float = 1.0
    groups: tuple[int, int] = (1, 1)
    shared: SharedSpec | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], layers: int) -> ExpertSpec | None:
        """Read the fields of a config.json; None for a family without experts.

        Raises:
            CheckpointError: a field is invalid.
            KeyError: a field is missing.
        """
        family = config.get("model_type")
        if family == "mixtral":
            return cls(
                count=_size(config, ("num_local_experts", "num_experts"), 8),
                top_k=_size(config, ("num_experts_per_tok",), 2),
                intermediate=_size(config, ("intermediate_size",)),
                normalized=True,
                sparse=(True,) * layers,
                block="block_sparse_moe",
                projections=("w1", "w3", "w2"),
            )
        if family in _QWEN:
            count, top_k, width = _QWEN[family]
            step = _size(config, ("decoder_sparse_step",), 1)
            dense = set(config.get("mlp_only_layers") or ())
            return cls(
                count=_size(config, ("num_local_experts", "num_experts"), count),
                top_k=_size(config, ("num_experts_per_tok",), top_k),
                intermediate=_size(config, ("moe_intermediate_size",), width),
                normalized=bool(config.get("norm_topk_prob", False)),
                sparse=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers)),
                shared=None if family == "qwen3_moe" else _shared_qwen(config),
            )
        return _like_deepseek(cls, config, layers, family) if family in _DEEPSEEK else None

    def router(self, layer: int) -> str:
        """Return the name of a layer's router weight, `[count, hidden]`."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def correction(self, layer: int) -> str | None:
        """Return the name of a layer's correction bias, float32 `[count]`; None for routers without one."""
        bias = f"model.layers.{layer}.{self.block}.gate.e_score_correction_bias"
        return bias if self.score == "sigmoid" else None

    def projection(self, layer: int, expert: int, part: int) -> str:
        """Return the name of an expert's gate, up or down weight (part 0, 1 or 2)."""
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{self.projections[part]}.weight"

    def shared_projection(self, layer: int, part: int) -> str:
        """Return the name of the shared experts' gate, up or down weight (part 0, 1 or 2).

        Raises:
            ValueError: there are no shared experts.
        """
        if self.shared is None:
            raise ValueError("the model has no shared experts")
        return f"model.layers.{layer}.{self.block}.{self.shared.name}.{_GATE_UP_DOWN[part]}.weight"

    def shared_gate(self, layer: int) -> str | None:
        """Return the name of the weight that gates the shared experts, `[1, hidden]`; None without one."""
        if self.shared is None or self.shared.gate is None:
            return None
        return f"model.layers.{layer}.{self.block}.{self.shared.gate}.weight"

    def shapes(self, layer: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the tensors of a layer's router and experts."""
        found: dict[str, tuple[int, ...]] = {self.router(layer): (self.count, hidden)}
        if correction := self.correction(layer):
            found[correction] = (self.count,)
        for expert in range(self.count):
            for part, shape in enumerate(_mlp(self.intermediate, hidden)):
                found[self.projection(layer, expert, part)] = shape
        if self.shared is not None:
            found |= {self.shared_projection(layer, p): s for p, s in enumerate(_mlp(self.shared.width, hidden))}
        if gate := self.shared_gate(layer):
            found[gate] = (1, hidden)
        return found


def _mlp(width: int, hidden: int) -> tuple[tuple[int, int], ...]:
    return (width, hidden), (width, hidden), (hidden, width)


def _shared_qwen(config: Mapping[str, Any]) -> SharedSpec:
    width = _size(config, ("shared_expert_intermediate_size",), 5632)
    return SharedSpec(width=width, name="shared_expert", gate="shared_expert_gate")


def _like_deepseek(cls: type[ExpertSpec], config: Mapping[str, Any], layers: int, family: str) -> ExpertSpec:
    """Return the experts of a family whose routers and experts are those of DeepSeek-V3."""
    default = _DEEPSEEK[family]
    width = _size(config, ("moe_intermediate_size",), default["moe_intermediate_size"])
    shared = _size(config, ("n_shared_experts",), default["n_shared_experts"])
    dense = config.get("first_k_dense_replace", default["first_k_dense_replace"]) or 0
    groups = tuple(_size(config, (name,), default[name]) for name in ("n_group", "topk_group"))
    return cls(
        count=_size(config, ("n_routed_experts", "num_local_experts"), default["n_routed_experts"]),
        top_k=_size(config, ("num_experts_per_tok",), default["num_experts_per_tok"]),
        intermediate=width,
        normalized=bool(config.get("norm_topk_prob", default["norm_topk_prob"])),
        sparse=tuple(layer >= dense for layer in range(layers)),
        score="sigmoid",
        scale=number(config, "routed_scaling_factor", default["routed_scaling_factor"]),
        groups=(groups[0], groups[1]) if groups[1] < groups[0] else (1, 1),
        shared=SharedSpec(width=shared * width, name="shared_experts"),
    )


def _size(config: Mapping[str, Any], names: tuple[str, ...], default: int | None = None) -> int:
    given = next((name for name in names if config.get(name) is not None), names[0])
    if config.get(given) is None and default is None:
        raise KeyError(given)
    return size({given: config[given] if config.get(given) is not None else default}, given)
