"""Megatron-Core's names of routers and experts, and the one form of them that the converter works with.

`SequentialMLP`, `TEGroupedMLP` and `torch_dist` checkpoints name the same tensors differently. `canonical` and
`unstacked` give them the names `mlp.experts.EXPERT.linear_fc1.weight`, with experts numbered over all ranks. The older
`GroupedMLP` (`mlp.experts.weight1`) is unsupported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from polyshard.config.decoder_spec import DecoderSpec
from polyshard.core.errors import CheckpointError
from polyshard.weights.lazy_tensor import LazyTensor

ROUTER = "mlp.router.weight"
_SEQUENTIAL = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)$")
_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12]\.(?:weight|bias))(\d+)$")
_STACKED = re.compile(r"mlp\.experts\.experts\.(linear_fc[12]\..+)$")
_SINGLE = re.compile(r"mlp\.experts\.experts\.(\d+)\.(linear_fc[12]\..+)$")
_OLD = re.compile(r"mlp\.experts\.weight[12]$")


def local_expert(name: str) -> tuple[int, str] | None:
    """Return the number of an expert on its rank and the rest of the name; None for other tensors.

    Raises:
        CheckpointError: the tensor is of `GroupedMLP`.
    """
    refuse_grouped(name)
    if match := _SEQUENTIAL.search(name):
        return int(match[1]), match[2]
    if match := _GROUPED.search(name):
        return int(match[2]), match[1]
    return None


def canonical(expert: int, rest: str) -> str:
    """Return the name of an expert's tensor within its layer."""
    return f"mlp.experts.{expert}.{rest}"


def refuse_grouped(name: str) -> None:
    """Raise `CheckpointError` for a tensor of Megatron's `GroupedMLP`."""
    if _OLD.search(name):
        raise CheckpointError(
            f"{name} is of Megatron's GroupedMLP, which is unsupported: got the experts of a rank in one tensor, "
            "expected SequentialMLP or TEGroupedMLP. Save the model again with one of them."
        )


def unstacked(name: str, tensor: LazyTensor) -> Iterator[tuple[str, LazyTensor]]:
    """Yield the tensors of all experts that a tensor of one layer of a `torch_dist` checkpoint stacks, or itself."""
    refuse_grouped(name)
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
    need: Callable[[str], LazyTensor],
    half: Callable[[LazyTensor, int], LazyTensor],
) -> Mapping[str, LazyTensor]:
    """Return Hugging Face's tensors of all routers and experts.

    Args:
        layers: what stands before the number of a layer.
        spec: the decoder spec of the model.
        need: returns a tensor by its canonical name.
        half: returns the gate or the up projection of a fused tensor.
    """
    experts, found = spec.experts, dict[str, LazyTensor]()
    if experts is None:
        return found
    for layer in (layer for layer in range(spec.layers) if experts.sparse[layer]):
        found[experts.router(layer)] = need(f"{layers}{layer}.{ROUTER}")
        for expert in range(experts.count):
            fused = need(f"{layers}{layer}.{canonical(expert, 'linear_fc1.weight')}")
            found |= {experts.projection(layer, expert, part): half(fused, part) for part in range(2)}
            found[experts.projection(layer, expert, 2)] = need(
                f"{layers}{layer}.{canonical(expert, 'linear_fc2.weight')}"
            )
    return found
