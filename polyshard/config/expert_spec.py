"""The experts of a Llama-like decoder with a mixture of experts, as described by its config.json.

Missing fields take the defaults of the family's class in transformers, as in `DecoderSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyshard.core.errors import CheckpointError

EXPERT_FAMILIES = ("mixtral", "qwen3_moe")


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
    """

    count: int
    top_k: int
    intermediate: int
    normalized: bool
    sparse: tuple[bool, ...]
    block: str
    projections: tuple[str, str, str]

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
        if family == "qwen3_moe":
            step = _size(config, ("decoder_sparse_step",), 1)
            dense = set(config.get("mlp_only_layers") or ())
            return cls(
                count=_size(config, ("num_local_experts", "num_experts"), 128),
                top_k=_size(config, ("num_experts_per_tok",), 8),
                intermediate=_size(config, ("moe_intermediate_size",), 768),
                normalized=bool(config.get("norm_topk_prob", False)),
                sparse=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers)),
                block="mlp",
                projections=("gate_proj", "up_proj", "down_proj"),
            )
        return None

    def router(self, layer: int) -> str:
        """Return the name of a layer's router weight, `[count, hidden]`."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def projection(self, layer: int, expert: int, part: int) -> str:
        """Return the name of an expert's gate, up or down weight (part 0, 1 or 2)."""
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{self.projections[part]}.weight"

    def shapes(self, layer: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the tensors of a layer's router and experts."""
        found: dict[str, tuple[int, ...]] = {self.router(layer): (self.count, hidden)}
        for expert in range(self.count):
            for part, shape in enumerate((*((self.intermediate, hidden),) * 2, (hidden, self.intermediate))):
                found[self.projection(layer, expert, part)] = shape
        return found


def _size(config: Mapping[str, Any], names: tuple[str, ...], default: int | None = None) -> int:
    given = next((name for name in names if config.get(name) is not None), names[0])
    value = config.get(given, default)
    if value is None:
        raise KeyError(given)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"the configuration's {given} is wrong: got {value!r}, expected a positive integer.")
    return value
