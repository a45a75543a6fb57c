"""Megatron-Core's names of routers and experts, and the one form of them that the converter works with.

`SequentialMLP`, `TEGroupedMLP`, `GroupedMLP` and `torch_dist` checkpoints store the same tensors differently.
`one_by_one`, `canonical` and `unstacked` give them the names `mlp.experts.EXPERT.linear_fc1.weight`, with experts
numbered over all ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from polyshard.config.decoder_spec import DecoderSpec
from polyshard.config.expert_spec import ExpertSpec
from polyshard.core.errors import CheckpointError
from polyshard.weights.lazy_tensor import LazyTensor

Load = Callable[[str], torch.Tensor]

ROUTER, EXPERT_BIAS = "mlp.router.weight", "mlp.router.expert_bias"
SHARED = "mlp.shared_experts"
COUNTERS = re.compile(r"mlp\.router\.(local_tokens_per_expert|global_tokens_per_expert|ga_steps)$")
_SEQUENTIAL = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)$")
_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12]\.(?:weight|bias))(\d+)$")
_STACKED = re.compile(r"mlp\.experts\.experts\.(linear_fc[12]\..+)$")
_SINGLE = re.compile(r"mlp\.experts\.experts\.(\d+)\.(linear_fc[12]\..+)$")
_IN_ONE = re.compile(r"mlp\.experts\.weight([12])$")


def local_expert(name: str) -> tuple[int, str] | None:
    """Return the number of an expert on its rank and the rest of the name; None for other tensors."""
    if match := _SEQUENTIAL.search(name):
        return int(match[1]), match[2]
    if match := _GROUPED.search(name):
        return int(match[2]), match[1]
    return None


def canonical(expert: int, rest: str) -> str:
    """Return the name of an expert's tensor within its layer."""
    return f"mlp.experts.{expert}.{rest}"


def is_grouped(name: str) -> bool:
    """Whether a tensor holds all experts of a rank, as in `GroupedMLP`."""
    return _IN_ONE.search(name) is not None


def one_by_one(state: Mapping[str, Any], spec: DecoderSpec, ranks: int) -> Mapping[str, Any]:
    """Return a rank's tensors with those of `GroupedMLP` split into one for each expert, named as in `SequentialMLP`.

    `weight1` `[hidden, experts * 2 * width]` is the memory of `[experts, hidden, 2 * width]`, and `weight2`
    `[experts * width, hidden]` that of `[experts, width, hidden]`: both are transposed in comparison with linear
    layers. Source: `GroupedMLP.forward` in `megatron/core/transformer/moe/experts.py`.

    Args:
        state: the tensors of one rank.
        spec: the decoder spec of the model.
        ranks: number of expert ranks.

    Raises:
        CheckpointError: the configuration has no experts, or a tensor does not hold as many experts.
    """
    found = dict[str, Any]()
    for name, value in state.items():
        match = _IN_ONE.search(name) if isinstance(value, torch.Tensor) else None
        if match is None:
            found[name] = value
            continue
        count, rest = divmod(spec.experts.count if spec.experts else 0, ranks)
        dim = 2 - int(match[1])  # the dimension that the experts share
        if count < 1 or rest or value.dim() != 2 or value.shape[1 - dim] != spec.hidden or value.shape[dim] % count:
            raise CheckpointError(
                f"{name} does not fit the configuration: got {list(value.shape)} on each of {ranks} expert ranks, "
                f"expected {spec.experts.count if spec.experts else 'no'} experts of hidden size {spec.hidden}. Pass "
                "--config with the configuration that belongs to this checkpoint, or all of its ranks."
            )
        shape = (count, spec.hidden, -1) if dim else (count, -1, spec.hidden)
        for expert, part in enumerate(value.reshape(shape).transpose(1, 2)):
            own = f"mlp.experts.local_experts.{expert}.linear_fc{match[1]}.weight"
            found[name[: match.start()] + own] = part
    return found


def unstacked(name: str, tensor: LazyTensor) -> Iterator[tuple[str, LazyTensor]]:
    """Yield the tensors of all experts that a tensor of one layer of a `torch_dist` checkpoint stacks, or itself.

    `GroupedMLP` stores the same tensors there as `SequentialMLP`.
    """
    if match := _SINGLE.search(name):
        yield name[: match.start()] + canonical(int(match[1]), match[2]), tensor
    elif match := _STACKED.search(name):
        for expert in range(tensor.shape[0]):
            part = LazyTensor(tensor.shape[1:], tensor.dtype, lambda expert=expert: tensor.load()[expert])
            yield name[: match.start()] + canonical(expert, match[1]), part
    else:
        yield name, tensor


def experts_to_hugging_face(
    layers: str,
    spec: DecoderSpec,
    held: Mapping[str, LazyTensor],
    need: Callable[[str], LazyTensor],
    half: Callable[[LazyTensor, int], LazyTensor],
) -> Mapping[str, LazyTensor]:
    """Return Hugging Face's tensors of all routers and experts.

    Args:
        layers: what stands before the number of a layer.
        spec: the decoder spec of the model.
        held: all tensors, by their canonical names.
        need: returns a tensor by its canonical name.
        half: returns the gate or the up projection of a fused tensor.
    """
    experts, found = spec.experts, dict[str, LazyTensor]()
    if experts is None:
        return found
    for layer in (layer for layer in range(spec.layers) if experts.sparse[layer]):
        found[experts.router(layer)] = need(f"{layers}{layer}.{ROUTER}")
        if correction := experts.correction(layer):
            bias = f"{layers}{layer}.{EXPERT_BIAS}"
            found[correction] = need(bias) if bias in held else _zeros(experts)
        for expert in range(experts.count):
            fused = need(f"{layers}{layer}.{canonical(expert, 'linear_fc1.weight')}")
            found |= {experts.projection(layer, expert, part): half(fused, part) for part in range(2)}
            found[experts.projection(layer, expert, 2)] = need(
                f"{layers}{layer}.{canonical(expert, 'linear_fc2.weight')}"
            )
        if experts.shared is not None:
            fused = need(f"{layers}{layer}.{SHARED}.linear_fc1.weight")
            found |= {experts.shared_projection(layer, part): half(fused, part) for part in range(2)}
            found[experts.shared_projection(layer, 2)] = need(f"{layers}{layer}.{SHARED}.linear_fc2.weight")
        if gate := experts.shared_gate(layer):
            found[gate] = need(f"{layers}{layer}.{SHARED}.gate_weight")
    return found


def stacked(count: int, make: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Return the tensors `make(0)`, `make(1)`, ... on a new first dimension, with one of them in memory at a time."""
    first = make(0)
    full = first.new_empty((count, *first.shape))
    full[0] = first
    for index in range(1, count):
        full[index] = make(index)
    return full


def expert_makers(experts: ExpertSpec, layer: int, load: Load) -> dict[str, Callable[[], torch.Tensor]]:
    """Return functions that make Megatron's tensors of a layer's router and experts, by their names in the layer.

    Experts are stacked, as in every `torch_dist` checkpoint.

    Args:
        experts: of the model.
        layer: number of a layer with experts.
        load: returns a tensor by Hugging Face's name.
    """

    def fused(expert: int) -> torch.Tensor:
        return torch.cat([load(experts.projection(layer, expert, part)) for part in range(2)])

    found: dict[str, Callable[[], torch.Tensor]] = {
        ROUTER: lambda: load(experts.router(layer)),
        "mlp.experts.experts.linear_fc1.weight": lambda: stacked(experts.count, fused),
        "mlp.experts.experts.linear_fc2.weight": lambda: stacked(
            experts.count, lambda expert: load(experts.projection(layer, expert, 2))
        ),
    }
    if correction := experts.correction(layer):
        found[EXPERT_BIAS] = lambda: load(correction)
    if experts.shared is not None:
        found |= {
            f"{SHARED}.linear_fc1.weight": lambda: torch.cat(
                [load(experts.shared_projection(layer, part)) for part in range(2)]
            ),
            f"{SHARED}.linear_fc2.weight": lambda: load(experts.shared_projection(layer, 2)),
        }
    if gate := experts.shared_gate(layer):
        found[f"{SHARED}.gate_weight"] = lambda: load(gate)
    return found


def expert_notes(held: Mapping[str, LazyTensor], spec: DecoderSpec) -> tuple[str, ...]:
    """Return a note if the configuration's routers have a correction bias, and the checkpoint's have none."""
    if spec.experts is None or spec.experts.score != "sigmoid" or any(name.endswith(EXPERT_BIAS) for name in held):
        return ()
    return ("the routers have no expert_bias: e_score_correction_bias is written as zeros, which have no effect",)


def _zeros(experts: ExpertSpec) -> LazyTensor:
    return LazyTensor((experts.count,), torch.float32, lambda: torch.zeros(experts.count))
