"""Whole tensors into the memory of one worker's model, layer by layer, with fingerprints of what then stands there.

A registered model's parameters are written directly, by their layouts: no meta tensors, no deferred copies. Where
vLLM keeps a packed copy of a weight (CPU linear layers) it is made anew as soon as the layer is complete, also for a
head that is tied to the embedding. vLLM's own models go through vLLM's layerwise reload.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.transfer.guard import WeightGuard
from polyshard.core.errors import WeightSyncError
from polyshard.core.weight_table import WeightEntry, stored_shape
from polyshard.weights.fingerprint import fingerprint
from polyshard.weights.movement import Moved, rectangle, take_region
from polyshard.weights.regions import Region, regions


class Receiver(Protocol):
    """One worker's side of an update."""

    guard: WeightGuard

    def begin(self, version: str) -> None:
        """From here on the model refuses to compute."""
        ...

    def take(self, tensors: Mapping[str, torch.Tensor]) -> list[Moved]:
        """Load whole tensors, by stored name; what stands in the model afterwards."""
        ...

    def finish(self) -> None:
        """Check that all weights came, and compute again."""
        ...


def receiver_for(model: nn.Module, vllm_config: Any) -> Receiver:
    """The receiver of a worker's model; one for its whole life."""
    known = getattr(model, "polyshard_receiver", None)
    if known is None:
        if getattr(model, "quantized", None) is not None:
            raise WeightSyncError("the engine serves a quantized checkpoint: weights would have to be quantized too")
        known = ServedReceiver(model) if hasattr(model, "table") else NativeReceiver(model, vllm_config)
        object.__setattr__(model, "polyshard_receiver", known)
    return known


@dataclass(frozen=True, slots=True)
class MemoryKind:
    """Dtype and device of a parameter, and whether vLLM keeps nothing of it but a packed copy."""

    dtype: torch.dtype
    device: torch.device
    packed_alone: bool


class ServedReceiver:
    """For a model that polyshard registered."""

    def __init__(self, model: Any) -> None:
        self.guard: WeightGuard = model.weights
        self._name = type(model).__name__
        self._model: nn.Module = model.model
        axis = model.context.axis("tensor")
        self.rank, self.size = axis.rank, axis.size
        self.table = model.table
        self.targets: dict[str, tuple[WeightEntry, int]] = self.table.by_checkpoint_name()
        self.regions: dict[str, list[Region]] = {}
        for entry in self.table.values():
            for region in regions(entry, self.rank, self.size):
                self.regions.setdefault(region.name, []).append(region)
        self._tied = {name: entry.checkpoint_names[0] for entry in self.table.values() for name in entry.tied_names}
        self._owners = {entry.parameter: self._modules_of(entry) for entry in self.table.values()}
        self._parameters: dict[nn.Module, list[str]] = {}  # of each layer
        for parameter, owners in self._owners.items():
            for module, _ in owners:
                self._parameters.setdefault(module, []).append(parameter)
        self._version = ""
        self._came: set[str] = set()
        self._shards: dict[str, torch.Tensor] = {}

    def begin(self, version: str) -> None:
        """From here on the model refuses to compute.

        Raises:
            WeightSyncError: a reload from a checkpoint has failed, and left parameters without memory.
        """
        if any(parameter.is_meta for parameter in self._model.parameters()):
            raise WeightSyncError(
                f"model {self._name!r} has parameters without memory since a reload failed: call reload_weights with a "
                "checkpoint that fits, or start the engine anew"
            )
        self.guard.refuse(f"the update to weights {version!r} has begun and is not finished")
        self._version, self._came = version, set()
        self._shards.clear()

    def take(self, tensors: Mapping[str, torch.Tensor]) -> list[Moved]:
        """Load whole tensors into this rank's shards."""
        moved: list[Moved] = []
        for sent, whole in tensors.items():
            name = self.expect(sent, tuple(whole.shape))
            if name is None:
                continue
            entry = self.targets[name][0]
            shard = self.shard(entry)
            for region in self.regions.get(name, []):
                moved.append(take_region(region, shard, rectangle(whole, region.offsets, region.sizes)))
            self.came(name)
        return moved

    def expect(self, sent: str, shape: tuple[int, ...]) -> str | None:
        """The stored name that a tensor is for; None where it came already under the name it is tied to.

        Raises:
            WeightSyncError: it is no weight of this model, came before, or has another shape.
        """
        name = sent if sent in self.targets else self._tied.get(sent)
        if name is None:
            raise WeightSyncError(f"{sent!r} is no weight of model {self._name!r}", (sent,), (self.rank,))
        if name in self._came:
            if name != sent:
                return None
            raise WeightSyncError(f"{sent!r} came twice in one update", (sent,), (self.rank,))
        entry, index = self.targets[name]
        expected = stored_shape(entry.layout, len(entry.checkpoint_names), index)
        if shape != expected:
            raise WeightSyncError(
                f"{sent!r} came as {list(shape)}, model {self._name!r} has {list(expected)}", (sent,), (self.rank,)
            )
        return name

    def shard(self, entry: WeightEntry) -> torch.Tensor:
        """Flattened memory of a parameter's shard: its own, or a new one where vLLM keeps but a packed copy."""
        held = self._shards.get(entry.parameter)
        if held is not None:
            return held
        parameter = self._parameter(entry.parameter)
        shape = entry.layout.local_shape(self.rank, self.size)
        if tuple(parameter.shape) != shape:
            fresh = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
            self.place(entry, fresh)
            parameter = fresh
        self._shards[entry.parameter] = parameter.detach().view(-1)
        return self._shards[entry.parameter]

    def memory_kind(self, entry: WeightEntry) -> MemoryKind:
        """What a parameter's memory is like."""
        parameter = self._parameter(entry.parameter)
        packed = tuple(parameter.shape) != entry.layout.local_shape(self.rank, self.size)
        return MemoryKind(parameter.dtype, parameter.device, packed)

    def is_at(self, entry: WeightEntry, values: torch.Tensor) -> bool:
        """Whether the parameter's memory is that of `values`: the engine serves the trainer's own module."""
        parameter = self._parameter(entry.parameter)
        return parameter.shape == values.shape and parameter.data_ptr() == values.data_ptr() != 0

    def place(self, entry: WeightEntry, values: torch.Tensor) -> None:
        """Make `values` the parameter's memory, wherever the parameter is used."""
        parameter = nn.Parameter(values, requires_grad=False)
        for module, leaf in self._owners[entry.parameter]:
            module.register_parameter(leaf, parameter)

    def came(self, name: str) -> None:
        """A stored tensor stands in its shard; where its layer is complete, packed copies are made anew."""
        self._came.add(name)
        entry = self.targets[name][0]
        for module, _ in self._owners[entry.parameter]:
            if self._is_complete(module):
                compat.process_after_loading(module)
                for parameter in self._parameters[module]:
                    self._shards.pop(parameter, None)

    def finish(self) -> None:
        """Check that all weights came, and compute again."""
        missing = [name for name in self.targets if name not in self._came]
        if missing:
            raise WeightSyncError(
                f"the update to weights {self._version!r} lacks {len(missing)} tensors: {', '.join(missing[:5])}",
                tuple(missing),
                (self.rank,),
            )
        self._shards.clear()
        for module in self._model.modules():
            compat.absorb_latents(module)
        self.guard.accept(self._version)

    def _parameter(self, name: str) -> torch.Tensor:
        module, leaf = self._owners[name][0]
        return getattr(module, leaf)

    def _modules_of(self, entry: WeightEntry) -> list[tuple[nn.Module, str]]:
        places = (entry.parameter, *entry.tied_parameters)
        parts = [place.rpartition(".") for place in places]
        return [(compat.base_layer(self._model.get_submodule(module)), leaf) for module, _, leaf in parts]

    def _is_complete(self, module: nn.Module) -> bool:
        return all(name in self._came for p in self._parameters[module] for name in self.table[p].checkpoint_names)


class NativeReceiver:
    """For vLLM's own models, through vLLM's layerwise reload. What is proved is what arrived, not what was loaded."""

    def __init__(self, model: nn.Module, vllm_config: Any) -> None:
        self.guard = WeightGuard()
        self._model, self._config = model, vllm_config
        self._version = ""
        self._loaded: set[str] = set()
        self._came: set[str] = set()
        self._names = {name for name, _ in model.named_parameters()}
        model.register_forward_pre_hook(lambda *_: self.guard.check())

    def begin(self, version: str) -> None:
        """From here on the model refuses to compute."""
        self.guard.refuse(f"the update to weights {version!r} has begun and is not finished")
        self._version, self._loaded, self._came = version, set(), set()
        compat.begin_reload(self._model, self._config)

    def take(self, tensors: Mapping[str, torch.Tensor]) -> list[Moved]:
        """Hand whole tensors to the model's own `load_weights`."""
        doubled = [name for name in tensors if name in self._came]
        if doubled:
            raise WeightSyncError(f"{doubled[0]!r} came twice in one update", tuple(doubled))
        self._came |= set(tensors)
        # vLLM defers the copy until a layer is complete: the tensors have to outlive this call.
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
        loaded = compat.load_into(self._model, self._config, kept.items())
        self._loaded |= loaded if loaded is not None else self._names
        return [
            Moved(name, (0,) * tensor.dim(), tuple(tensor.shape), True, fingerprint(tensor))
            for name, tensor in kept.items()
        ]

    def finish(self) -> None:
        """End the reload, and compute again."""
        missing = sorted(self._names - self._loaded)
        if missing:
            raise WeightSyncError(
                f"the update to weights {self._version!r} lacks parameters: {', '.join(missing[:5])}", tuple(missing)
            )
        compat.end_reload(self._model, self._config)
        self.guard.accept(self._version)
