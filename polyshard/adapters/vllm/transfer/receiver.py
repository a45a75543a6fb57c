"""Loading full tensors into the model of one worker, layer by layer, with fingerprints read back from its memory.

Parameters of a registered model are written directly by their layouts, without meta tensors or deferred copies. If
vLLM keeps a packed copy of a weight (CPU linear layers), it is repacked once the layer is complete, also for a head
tied to the embedding. vLLM's own models go through vLLM's layerwise reload.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.transfer.guard import WeightGuard
from polyshard.attention.module import TrainableFlashAttention
from polyshard.core.computation import Computation, computation_of
from polyshard.core.errors import WeightSyncError
from polyshard.core.weight_table import WeightEntry, stored_shape
from polyshard.weights.fingerprint import fingerprint
from polyshard.weights.movement import Moved, rectangle, take_region
from polyshard.weights.regions import Region, regions


class Receiver(Protocol):
    """One worker's side of an update."""

    guard: WeightGuard

    def computation(self) -> Computation:
        """Return what the model's layers compute with besides their weights, as far as it is known."""
        ...

    def begin(self, version: str) -> None:
        """Start an update; the model refuses to compute until `finish`."""
        ...

    def load(self, tensors: Mapping[str, torch.Tensor]) -> list[Moved]:
        """Load full tensors by stored name; return the regions read back from the model."""
        ...

    def finish(self) -> None:
        """Check that all weights were received, and allow the model to compute again."""
        ...


def receiver_for(model: nn.Module, vllm_config: Any) -> Receiver:
    """Return the receiver of a worker's model; there is one per model.

    Raises:
        WeightSyncError: the engine serves a quantized checkpoint, or keeps KV cache outside that it cannot drop.
    """
    receiver = getattr(model, "polyshard_receiver", None)
    if receiver is None:
        if getattr(model, "quantized", None) is not None:
            raise WeightSyncError(
                "weight sync is unsupported for quantized checkpoints. Serve a floating-point checkpoint"
            )
        connector = compat.connector_without_reset(vllm_config)
        if connector is not None:
            raise WeightSyncError(
                f"weight sync is unsupported with the KV connector {connector}: it has no reset_cache, so that prompts "
                "would continue from KV cache of the old weights. Start the engine without it, or with a connector "
                "that vLLM can reset"
            )
        receiver = ServedReceiver(model) if hasattr(model, "table") else NativeReceiver(model, vllm_config)
        object.__setattr__(model, "polyshard_receiver", receiver)
    return receiver


@dataclass(frozen=True, slots=True)
class MemoryKind:
    """Dtype and device of a parameter, and whether vLLM keeps only a packed copy of it."""

    dtype: torch.dtype
    device: torch.device
    only_packed: bool


class ServedReceiver:
    """The receiver of a model that was registered with polyshard."""

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
        self._received: set[str] = set()
        self._shards: dict[str, torch.Tensor] = {}
        self._shared: set[str] = set()  # parameters in the trainer's memory

    def computation(self) -> Computation:
        """Return what the model's layers compute with besides their weights."""
        return computation_of(self._model, self.table)

    def begin(self, version: str) -> None:
        """Start an update; the model refuses to compute until `finish`.

        Raises:
            WeightSyncError: a failed reload from a checkpoint has left parameters without memory.
        """
        if any(parameter.is_meta for parameter in self._model.parameters()):
            raise WeightSyncError(
                f"model {self._name!r} has parameters without memory after a failed reload. Call reload_weights with a "
                "matching checkpoint, or restart the engine"
            )
        self.guard.refuse(f"the update to weights {version!r} has begun and is not finished")
        self._version, self._received = version, set()
        self._shards.clear()

    def load(self, tensors: Mapping[str, torch.Tensor]) -> list[Moved]:
        """Load full tensors into this rank's shards; return the regions read back."""
        moved: list[Moved] = []
        for sent, full in tensors.items():
            name = self.resolve_name(sent, tuple(full.shape))
            if name is None:
                continue
            entry = self.targets[name][0]
            shard = self.shard(entry)
            for region in self.regions.get(name, []):
                moved.append(take_region(region, shard, rectangle(full, region.offsets, region.sizes)))
            self.mark_received(name)
        return moved

    def resolve_name(self, sent: str, shape: tuple[int, ...]) -> str | None:
        """Return the stored name that a sent tensor belongs to; None if it was already received under its tied name.

        Raises:
            WeightSyncError: it is not a weight of this model, was received before, or has the wrong shape.
        """
        name = sent if sent in self.targets else self._tied.get(sent)
        if name is None:
            raise WeightSyncError(f"{sent!r} is not a weight of model {self._name!r}", (sent,), (self.rank,))
        if name in self._received:
            if name != sent:
                return None
            raise WeightSyncError(f"{sent!r} was sent twice in one update", (sent,), (self.rank,))
        entry, index = self.targets[name]
        expected = stored_shape(entry.layout, len(entry.checkpoint_names), index)
        if shape != expected:
            raise WeightSyncError(
                f"{sent!r} has the wrong shape for model {self._name!r}: got {list(shape)}, expected {list(expected)}",
                (sent,),
                (self.rank,),
            )
        return name

    def shard(self, entry: WeightEntry) -> torch.Tensor:
        """Return the flattened memory of a parameter's shard, allocated if vLLM keeps only a packed copy."""
        known = self._shards.get(entry.parameter)
        if known is not None:
            return known
        parameter = self._parameter(entry.parameter)
        shape = entry.layout.local_shape(self.rank, self.size)
        if tuple(parameter.shape) != shape:
            fresh = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
            self.place(entry, fresh)
            parameter = fresh
        self._shards[entry.parameter] = parameter.detach().view(-1)
        return self._shards[entry.parameter]

    def memory_kind(self, entry: WeightEntry) -> MemoryKind:
        """Return the properties of a parameter's memory."""
        parameter = self._parameter(entry.parameter)
        packed = tuple(parameter.shape) != entry.layout.local_shape(self.rank, self.size)
        return MemoryKind(parameter.dtype, parameter.device, packed)

    def shares_memory_with(self, entry: WeightEntry, values: torch.Tensor) -> bool:
        """Whether the parameter uses the memory of `values`, as when the engine serves a live module."""
        parameter = self._parameter(entry.parameter)
        return parameter.shape == values.shape and parameter.data_ptr() == values.data_ptr() != 0

    def place(self, entry: WeightEntry, values: torch.Tensor) -> None:
        """Use `values` as the parameter's memory in every module that has the parameter."""
        parameter = nn.Parameter(values, requires_grad=False)
        loader = getattr(self._parameter(entry.parameter), "weight_loader", None)
        if loader is not None:  # vLLM's reload keeps a bias, and needs its loader
            parameter.weight_loader = loader  # pyrefly: ignore
        for module, leaf in self._owners[entry.parameter]:
            module.register_parameter(leaf, parameter)

    def share(self, entry: WeightEntry, values: torch.Tensor) -> None:
        """Use the trainer's memory as the parameter's."""
        self.place(entry, values)
        self._shared.add(entry.parameter)

    def end_sharing(self) -> None:
        """Give shared parameters memory of their own in a reload that has begun, which would write to the trainer's."""
        for name in self._shared:
            compat.own_kernel_tensors(self._owners[name])
        self._shared.clear()

    def mark_received(self, name: str) -> None:
        """Record that a stored tensor is in its shard, and repack its layers once they are complete."""
        self._received.add(name)
        entry = self.targets[name][0]
        for module, _ in self._owners[entry.parameter]:
            if self._is_complete(module):
                compat.process_after_loading(module)
                for parameter in self._parameters[module]:
                    self._shards.pop(parameter, None)

    def finish(self) -> None:
        """Check that all weights were received, and allow the model to compute again."""
        missing = [name for name in self.targets if name not in self._received]
        if missing:
            raise WeightSyncError(
                f"the update to weights {self._version!r} lacks {len(missing)} tensors: {', '.join(missing[:5])}",
                tuple(missing),
                (self.rank,),
            )
        self._shards.clear()
        for module in self._model.modules():
            compat.absorb_latents(module)
            if isinstance(module, TrainableFlashAttention):
                module.renew_sinks()
        self.guard.accept(self._version)

    def _parameter(self, name: str) -> torch.Tensor:
        module, leaf = self._owners[name][0]
        return getattr(module, leaf)

    def _modules_of(self, entry: WeightEntry) -> list[tuple[nn.Module, str]]:
        places = (entry.parameter, *entry.tied_parameters)
        parts = [place.rpartition(".") for place in places]
        return [(compat.base_layer(self._model.get_submodule(module)), leaf) for module, _, leaf in parts]

    def _is_complete(self, module: nn.Module) -> bool:
        return all(name in self._received for p in self._parameters[module] for name in self.table[p].checkpoint_names)


class NativeReceiver:
    """The receiver of vLLM's own models, through vLLM's layerwise reload.

    Its fingerprints are those of the tensors that arrived, not of the loaded parameters.
    """

    def __init__(self, model: nn.Module, vllm_config: Any) -> None:
        self.guard = WeightGuard()
        self._model, self._config = model, vllm_config
        self._version = ""
        self._loaded: set[str] = set()
        self._received: set[str] = set()
        self._names = {name for name, _ in model.named_parameters()}
        model.register_forward_pre_hook(lambda *_: self.guard.check())

    def computation(self) -> Computation:
        """Return nothing: what vLLM's own layers compute with is not known."""
        return {}

    def begin(self, version: str) -> None:
        """Start an update; the model refuses to compute until `finish`."""
        self.guard.refuse(f"the update to weights {version!r} has begun and is not finished")
        self._version, self._loaded, self._received = version, set(), set()
        compat.begin_reload(self._model, self._config)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> list[Moved]:
        """Pass full tensors to the model's own `load_weights`; return fingerprints of what arrived."""
        duplicates = [name for name in tensors if name in self._received]
        if duplicates:
            raise WeightSyncError(f"{duplicates[0]!r} was sent twice in one update", tuple(duplicates))
        self._received |= set(tensors)
        # vLLM copies a layer only once it is complete, so the tensors must outlive this call.
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
        loaded = compat.load_into(self._model, self._config, kept.items())
        self._loaded |= loaded if loaded is not None else self._names
        return [
            Moved(name, (0,) * tensor.dim(), tuple(tensor.shape), True, fingerprint(tensor))
            for name, tensor in kept.items()
        ]

    def finish(self) -> None:
        """End the reload, and allow the model to compute again."""
        missing = sorted(self._names - self._loaded)
        if missing:
            raise WeightSyncError(
                f"the update to weights {self._version!r} lacks parameters: {', '.join(missing[:5])}", tuple(missing)
            )
        compat.end_reload(self._model, self._config)
        self.guard.accept(self._version)
