"""How checkpoints store a mixture-of-experts block of transformers, found by converting marked values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyshard.core.experts import ExpertStorage
from polyshard.transformers.replaced.recognize import NotRecognised
from polyshard.transformers.trial.mixture_block import is_transposed


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBlock:
    """A block's names in checkpoints.

    Attributes:
        path: the block's path.
        experts: how the experts are stored.
        names: the names, below `path`, of the tensors that are not stored expert by expert, by those in the block.
        children: the names, below `path`, of the layer's children that are not experts, by attribute.
    """

    path: str
    experts: ExpertStorage
    names: Mapping[str, str]
    children: Mapping[str, str]


def tensors_of(block: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a module, by name."""
    return dict(block.named_parameters()) | dict(block.named_buffers())


def stored_block(model: Any, path: str, block: Any, sizes: Mapping[str, Any]) -> StoredBlock:
    """Return a block's names in checkpoints.

    transformers converts small tensors with marked values, so that no name is taken by its looks.

    Args:
        model: transformers' model.
        path: the block's path in it.
        block: the block.
        sizes: the block's settings, with the paths of the router's tensors.

    Raises:
        NotRecognised: the storage is unsupported.
    """
    experts, count = block.experts, sizes["num_experts"]
    others = [name for name in tensors_of(block) if not name.startswith("experts.")]
    marks = {f"{path}.{name}": torch.full((1, 1), -0.25 - index) for index, name in enumerate(others)}
    gate_up = torch.arange(2.0 * count, device="cpu").view(count, 2, 1)
    down = torch.arange(-1.0, -count - 1, -1, device="cpu").view(count, 1, 1)
    names = f"{path}.experts.gate_up_proj", f"{path}.experts.down_proj"
    transposed = is_transposed(experts, sizes["hidden_size"])
    stored = _converted(model, marks | ({} if transposed else dict(zip(names, (gate_up, down)))))
    values = {float(tensor): name for name, tensor in stored.items() if tensor.numel() == 1}
    stacked: dict[str, str] = {}
    if transposed:
        interleaved = not getattr(experts, "is_concatenated", True)
        storage, own = ExpertStorage(stacked="gate_up_proj", down="down_proj", interleaved=interleaved), path
    elif any(tensor.shape == gate_up.shape for tensor in stored.values()):
        if sizes["bias"]:
            raise NotRecognised("checkpoints store its experts stacked as [experts, 2 * size, hidden], with biases")
        storage, own, stacked = _stacked(path, gate_up, down, stored)
    else:
        storage, own = _one_by_one(path, count, values, stored)
    below = {name: values.get(-0.25 - index, "") for index, name in enumerate(others)}
    strangers = [stored for stored in below.values() if not stored.startswith(f"{own}.")]
    if strangers:
        raise NotRecognised(f"checkpoints store its tensors under other names: {strangers[0] or 'unknown ones'}")
    below = {name: stored.removeprefix(f"{own}.") for name, stored in below.items()}
    return StoredBlock(path=own, experts=storage, names=below | stacked, children=_children(below, sizes))


def _converted(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return revert_weight_conversion(model, tensors)
    except Exception as error:  # transformers' code may raise anything
        raise NotRecognised(f"the storage of its experts is unknown: {type(error).__name__}: {error}") from error


def _stacked(
    path: str, gate_up: torch.Tensor, down: torch.Tensor, stored: Mapping[str, torch.Tensor]
) -> tuple[ExpertStorage, str, dict[str, str]]:
    """Return the names of experts that are stacked as in memory, the path of their block, and the names below it."""
    parent = path.rpartition(".")[0]
    found = {}
    for part, wanted in (("experts.gate_up_proj", gate_up), ("experts.down_proj", down)):
        names = [name for name, tensor in stored.items() if torch.equal(tensor, wanted)]
        if len(names) != 1 or not names[0].startswith(f"{parent}."):
            raise NotRecognised(f"checkpoints store its experts under other names: {min(stored)}")
        found[part] = names[0].removeprefix(f"{parent}.").partition(".")
    blocks, below = {name[0] for name in found.values()}, {part: name[2] for part, name in found.items()}
    inside = {name.startswith("experts.") for name in below.values()}
    if len(blocks) != 1 or len(inside) != 1:
        raise NotRecognised(f"checkpoints store its experts under other names: {min(stored)}")
    gate_up_name, down_name = (name.removeprefix("experts.") for name in below.values())
    storage = ExpertStorage(stacked=gate_up_name, down=down_name, transposed=False, beside_router=not inside.pop())
    return storage, f"{parent}.{blocks.pop()}", below


def _one_by_one(
    path: str, count: int, values: Mapping[float, str], stored: Mapping[str, torch.Tensor]
) -> tuple[ExpertStorage, str]:
    """Return the names of experts that are stored one by one, and the path of their block in checkpoints."""
    parts: dict[str, set[str]] = {"gate": set(), "up": set(), "down": set()}
    prefixes = set()
    for index in range(count):
        for part, value in (("gate", 2.0 * index), ("up", 2.0 * index + 1), ("down", -1.0 - index)):
            match = re.fullmatch(rf"(.+)\.experts\.{index}\.(\w+)\.weight", values.get(value, ""))
            if match is None:
                raise NotRecognised(f"checkpoints store its experts under other names: {min(stored)}")
            prefixes.add(match[1])
            parts[part].add(match[2])
    (own,) = prefixes if len(prefixes) == 1 else ("",)
    if any(len(found) > 1 for found in parts.values()) or own.rpartition(".")[0] != path.rpartition(".")[0]:
        raise NotRecognised(f"checkpoints store its experts under other names: {min(stored)}")
    gate, up, down = (next(iter(parts[part])) for part in ("gate", "up", "down"))
    return ExpertStorage(gate=gate, up=up, down=down), own


def _children(names: Mapping[str, str], sizes: Mapping[str, Any]) -> dict[str, str]:
    """Return the names in checkpoints of the router and of the shared experts, by the layer's attributes."""
    found: dict[str, str] = {}
    for name, stored in names.items():
        if name == sizes["correction"]:
            continue
        child, _, leaf = name.partition(".")
        if child == sizes["router_name"]:
            leaf = name.rpartition(".")[2]
        own = stored.removesuffix(f".{leaf}")
        if own == stored or found.setdefault(child, own) != own:
            raise NotRecognised(f"checkpoints store its tensors under other names: {stored} for {name}")
    return found
