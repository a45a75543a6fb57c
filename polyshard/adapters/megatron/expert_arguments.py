"""Megatron's arguments of a mixture of experts that determine what the model computes.

Source: `megatron/training/arguments.py` of Megatron-LM; `transformer_config.py`, `moe/router.py` and
`moe/moe_utils.py` (`topk_routing_with_score_function`, `group_limited_topk`) of Megatron-Core 0.16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyshard.config.decoder_spec import DecoderSpec
from polyshard.config.expert_spec import ExpertSpec

# Arguments that no supported family has, with the values that have no effect.
NEUTRAL_OF_EXPERTS: Mapping[str, tuple[Any, ...]] = {
    "moe_apply_probs_on_input": (None, False),
    "moe_latent_size": (None,),
    "moe_router_force_load_balancing": (None, False),
    "moe_router_topk_limited_devices": (None,),
}


def expected_of_experts(spec: DecoderSpec, held: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that belong to the experts of a configuration, by name."""
    experts = spec.experts
    if experts is None:
        return {name: same for name, same in (("num_experts", 0), ("moe_layer_freq", 1)) if held.get(name)}
    expected: dict[str, Any] = {"num_experts": experts.count, "moe_router_topk": experts.top_k}
    width = "moe_ffn_hidden_size" if held.get("moe_ffn_hidden_size") is not None else "ffn_hidden_size"
    expected[width] = experts.intermediate
    if "moe_router_pre_softmax" in held and experts.score == "softmax":
        expected["moe_router_pre_softmax"] = not experts.normalized
    if (frequency := held.get("moe_layer_freq")) is not None:
        expected["moe_layer_freq"] = _frequency(experts.sparse, frequency)
    return expected


def router_settings(experts: ExpertSpec) -> dict[str, Any]:
    """Return Megatron's settings of a configuration's router and shared experts; None is Megatron's default."""
    grouped, shared = experts.groups != (1, 1), experts.shared
    return {
        "moe_router_score_function": experts.score,
        "moe_router_topk_scaling_factor": experts.scale if experts.scale != 1.0 else None,
        "moe_router_num_groups": experts.groups[0] if grouped else None,
        "moe_router_group_topk": experts.groups[1] if grouped else None,
        "moe_shared_expert_intermediate_size": shared.width if shared else None,
        "moe_shared_expert_gate": bool(shared and shared.gate),
    }


def expert_arguments(spec: DecoderSpec) -> dict[str, Any]:
    """Return Megatron's arguments of a configuration's experts; empty without any."""
    experts = spec.experts
    if experts is None:
        return {}
    return {
        "num_experts": experts.count,
        "moe_router_topk": experts.top_k,
        "moe_ffn_hidden_size": experts.intermediate,
        "moe_layer_freq": 1 if all(experts.sparse) else [int(sparse) for sparse in experts.sparse],
        "moe_router_pre_softmax": experts.score == "softmax" and not experts.normalized,
        "moe_router_enable_expert_bias": experts.score == "sigmoid",
        **router_settings(experts),
    }


def expert_differences(spec: DecoderSpec, held: Mapping[str, Any]) -> list[str]:
    """Return where arguments that may be absent, which then have Megatron's default, contradict a configuration."""
    experts = spec.experts
    if experts is None or held.get("num_experts") is None:
        return []
    settings = router_settings(experts)
    found = {name: _plain(name, held.get(name)) for name in settings}
    if found["moe_router_group_topk"] == found["moe_router_num_groups"]:
        found |= {"moe_router_group_topk": None, "moe_router_num_groups": None}  # all groups are chosen
    differences = [
        f"{name}: the checkpoint's arguments say {found[name]!r}, the configuration {expected!r}"
        for name, expected in settings.items()
        if found[name] != expected
    ]
    if "sinkhorn" in (held.get("moe_router_load_balancing_type") or ()):  # a name, or a list of names
        differences.append("moe_router_load_balancing_type: the configuration's model has no sinkhorn router")
    if experts.score == "softmax" and held.get("moe_router_enable_expert_bias"):
        differences.append("moe_router_enable_expert_bias: the configuration's router has no correction bias")
    if experts.score == "sigmoid" and experts.normalized != (experts.top_k > 1):
        differences.append(
            "norm_topk_prob: Megatron divides the weights by their sum if there are two or more for each token, the "
            f"configuration says {experts.normalized} for {experts.top_k}"
        )
    if experts.groups != (1, 1) and experts.top_k // experts.groups[1] != 2:
        differences.append(
            f"topk_group: Megatron ranks groups by the sum of their {experts.top_k // experts.groups[1]} best experts "
            "(moe_router_topk / moe_router_group_topk), the configuration's model by that of 2"
        )
    return differences


def capacity_note(held: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note if the experts drop tokens beyond a capacity, which no Hugging Face model does."""
    factor = held.get("moe_expert_capacity_factor")
    return () if factor is None else (f"left out moe_expert_capacity_factor={factor}: the target drops no tokens",)


def _plain(name: str, value: Any) -> Any:
    """Return an argument in the form of `router_settings`."""
    if name == "moe_router_score_function":
        return value or "softmax"
    if name == "moe_shared_expert_gate":
        return bool(value)
    return None if name == "moe_router_topk_scaling_factor" and value == 1 else value or None


def _frequency(sparse: tuple[bool, ...], stored: Any) -> Any:
    """Return the argument's value for these layers, in the form in which it is stored."""
    if isinstance(stored, int):
        # Megatron's layer i has experts if i is a multiple of the number, counted from 0.
        return (
            stored if sparse == tuple(layer % stored == 0 for layer in range(len(sparse))) else list(map(int, sparse))
        )
    return list(map(int, sparse))
