"""An engine whose worker is this very process: memory to memory, and shared where it can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.transfer.receiver import ServedReceiver, receiver_for
from polyshard.core.errors import WeightSyncError
from polyshard.core.exact_identity import identity_of
from polyshard.core.weight_table import WeightEntry, WeightTable
from polyshard.weights.fingerprint import fingerprint, total
from polyshard.weights.movement import Moved, rectangle, take_region
from polyshard.weights.regions import Region, regions


@dataclass(frozen=True, slots=True)
class Copied:
    """What was copied of a parameter: fingerprints of this trainer rank's part by name, and what then stood there."""

    sent: dict[str, int] = field(default_factory=dict)
    arrived: list[Moved] = field(default_factory=list)


class LocalEngine:
    """One engine in this process.

    Args:
        llm: the engine.
        name: for messages.
        worker: its worker.
        share: let the engine use the trainer's memory where shape and dtype allow.
    """

    def __init__(self, llm: Any, name: str, worker: compat.LocalWorker, share: bool) -> None:
        self.name = name
        self._llm = llm
        self.receiver = receiver_for(worker.model, worker.vllm_config)
        self.dtype = compat.engine_dtype(llm)
        self.exact = identity_of(getattr(worker.model, "context", None))
        self.tensor_size: int = worker.vllm_config.parallel_config.tensor_parallel_size
        # Captured CUDA graphs hold addresses: memory must then stay where it is.
        self._share = share and bool(worker.vllm_config.model_config.enforce_eager)
        self.shared_bytes = 0

    def require_idle(self) -> None:
        """Raise where requests are under way; those that a half-updated model refused are dropped."""
        requests = compat.unfinished_requests(self._llm)
        if requests and self.receiver.guard.problem is not None:
            self._llm.llm_engine.abort_request(requests, internal=True)
        elif requests:
            raise WeightSyncError(
                f"{self.name} has {len(requests)} unfinished requests: their cache is of the old weights. "
                "Let them finish, or abort them, before a sync"
            )

    def begin(self, version: str) -> None:
        """From here on the engine refuses to generate."""
        self.shared_bytes = 0
        self.receiver.begin(version)

    def reaches(self, table: WeightTable, tensor_rank: int, tensor_size: int) -> set[str]:
        """Stored names of which the trainer's shard in this process holds all that this worker needs."""
        receiver = self.receiver
        if not isinstance(receiver, ServedReceiver):
            return set()
        held: dict[str, list[Region]] = {}
        for entry in table.values():
            for region in regions(entry, tensor_rank, tensor_size):
                held.setdefault(region.name, []).append(region)
        return {
            name
            for name, needed in receiver.regions.items()
            if name in held and all(_covering(region, held[name]) is not None for region in needed)
        }

    def take_shard(
        self,
        entry: WeightEntry,
        shard: torch.Tensor,
        tensor_rank: int,
        tensor_size: int,
        lasting: bool,
        names: Mapping[str, tuple[int, ...]],
    ) -> Copied:
        """Load from the trainer's shard of a parameter, without a detour.

        Args:
            entry: the trainer's.
            shard: the trainer's.
            tensor_rank: the trainer's.
            tensor_size: the trainer's.
            lasting: `shard` is the parameter itself and not a gathered copy.
            names: which of the entry's stored tensors to load, with their shapes.

        Raises:
            WeightSyncError: a tensor does not fit, or what stands in a part that several workers hold differs.
        """
        receiver = self.receiver
        assert isinstance(receiver, ServedReceiver)
        wanted = [name for name in (receiver.expect(sent, shape) for sent, shape in names.items()) if name is not None]
        result = Copied()
        if not wanted:
            return result
        target = receiver.targets[wanted[0]][0]
        if receiver.is_at(target, shard):
            self.shared_bytes += shard.nbytes
        elif self._fits_as_it_is(target, entry, shard, tensor_rank, tensor_size, set(wanted), lasting):
            receiver.place(target, shard)  # nothing was copied, and nothing can differ
            self.shared_bytes += shard.nbytes
        else:
            flat = shard.detach().reshape(-1)
            memory = receiver.shard(target)
            for name in wanted:
                held = [region for region in regions(entry, tensor_rank, tensor_size) if region.name == name]
                # What is sent is read by the trainer's layout, what arrived by the server's.
                prints = [fingerprint(r.view(flat).to(memory.dtype), r.offsets) for r in held if r.first]
                result.sent[name] = total(prints)
                for region in receiver.regions.get(name, []):
                    values = _cut(flat, region, held).to(memory.dtype)
                    moved = take_region(region, memory, values)
                    result.arrived.append(moved)
                    if not region.first and moved.print != fingerprint(values, region.offsets):
                        told = f"{name!r} arrived damaged in worker {receiver.rank} of {self.name}"
                        raise WeightSyncError(told, (name,), (receiver.rank,))
        for name in wanted:
            receiver.came(name)
        return result

    def take(self, tensors: Mapping[str, torch.Tensor]) -> list[tuple[int, Moved]]:
        """Load whole tensors; what stands in the model afterwards."""
        receiver = self.receiver
        rank = receiver.rank if isinstance(receiver, ServedReceiver) else 0
        return [(rank, moved) for moved in receiver.take(tensors)]

    def finish(self, version: str, watch: Callable[[], str | None]) -> None:
        """The engine generates again."""
        self.receiver.finish()
        if self.shared_bytes:
            self.receiver.guard.accept(version, watch)
        self._llm.llm_engine.set_weight_version(version)
        if not self._llm.llm_engine.reset_prefix_cache():
            self.receiver.guard.refuse(f"its prefix cache was not emptied after the update to weights {version!r}")
            raise WeightSyncError(f"{self.name} did not empty its prefix cache: requests are under way")

    def close(self) -> None:
        """Nothing is held."""

    def _fits_as_it_is(
        self,
        target: WeightEntry,
        entry: WeightEntry,
        shard: torch.Tensor,
        tensor_rank: int,
        tensor_size: int,
        wanted: set[str],
        lasting: bool,
    ) -> bool:
        """Whether the engine can use the trainer's shard itself."""
        receiver = self.receiver
        assert isinstance(receiver, ServedReceiver)
        same = target.layout == entry.layout and set(target.checkpoint_names) == wanted
        here = (receiver.rank, receiver.size) == (tensor_rank, tensor_size)
        kind = receiver.memory_kind(target)
        return (
            self._share
            and same
            and here
            and (kind.dtype, kind.device) == (shard.dtype, shard.device)
            and shard.is_contiguous()
            and (lasting or kind.packed_alone)
        )


def _covering(region: Region, held: list[Region]) -> Region | None:
    for other in held:
        inside = other.name == region.name and all(
            o <= a and a + s <= o + t for a, s, o, t in zip(region.offsets, region.sizes, other.offsets, other.sizes)
        )
        if inside:
            return other
    return None


def _cut(flat: torch.Tensor, region: Region, held: list[Region]) -> torch.Tensor:
    source = _covering(region, held)
    assert source is not None
    view = source.view(flat)
    return rectangle(view, tuple(a - o for a, o in zip(region.offsets, source.offsets)), region.sizes)
