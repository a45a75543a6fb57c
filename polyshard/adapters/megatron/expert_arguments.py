"""Megatron's arguments of a mixture of experts that determine what the model computes.

Source: `megatron/training/arguments.py` of Megatron-LM and `transformer_config.py` of Megatron-Core 0.16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyshard.config.decoder_spec import DecoderSpec

# Arguments of routers and experts that Mixtral and Qwen3-MoE do not have, with the values that have no effect.
NEUTRAL_OF_EXPERTS: Mapping[str, tuple[Any, ...]] = {
    "moe_apply_probs_on_input": (None, False),
    "moe_latent_size": (None,),
    "moe_router_enable_expert_bias": (None, False),
    "moe_router_force_load_balancing": (None, False),
    "moe_router_group_topk": (None,),
    "moe_router_num_groups": (None,),
    "moe_router_score_function": (None, "softmax"),
    "moe_router_topk_scaling_factor": (None, 1, 1.0),
    "moe_shared_expert_gate": (None, False),
    "moe_shared_expert_intermediate_size": (None, 0),
}


def expected_of_experts(spec: DecoderSpec, held: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that belong to the experts of a configuration, by name."""
    experts = spec.experts
    if experts is None:
        return {name: same for name, same in (("num_experts", 0), ("moe_layer_freq", 1)) if held.get(name)}
    expected: dict[str, Any] = {"num_experts": experts.count, "moe_router_topk": experts.top_k}
    width = "moe_ffn_hidden_size" if held.get("moe_ffn_hidden_size") is not None else "ffn_hidden_size"
    expected[width] = experts.intermediate
    if "moe_router_pre_softmax" in held:
        expected["moe_router_pre_softmax"] = not experts.normalized
    if (frequency := held.get("moe_layer_freq")) is not None:
        expected["moe_layer_freq"] = _frequency(experts.sparse, frequency)
    return expected


def capacity_note(held: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note if the experts drop tokens beyond a capacity, which no Hugging Face model does."""
    factor = held.get("moe_expert_capacity_factor")
    return () if factor is None else (f"left out moe_expert_capacity_factor={factor}: the target drops no tokens",)


def _frequency(sparse: tuple[bool, ...], stored: Any) -> Any:
    """Return the argument's value for these layers, in the form in which it is stored."""
    if isinstance(stored, int):
        # Megatron's layer i has experts if i is a multiple of the number, counted from 0.
        return (
            stored if sparse == tuple(layer % stored == 0 for layer in range(len(sparse))) else list(map(int, sparse))
        )
    return list(map(int, sparse))
