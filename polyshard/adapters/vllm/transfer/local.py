"""An engine whose worker runs in this process: weights are copied within memory, or shared if possible."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.transfer.guard import WeightGuard
from polyshard.adapters.vllm.transfer.receiver import ServedReceiver, receiver_for
from polyshard.core.errors import WeightSyncError
from polyshard.core.exact_identity import identity_of
from polyshard.core.weight_table import WeightEntry, WeightTable
from polyshard.weights.fingerprint import fingerprint, total
from polyshard.weights.movement import Moved, rectangle, take_region
from polyshard.weights.regions import Region, regions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CopiedShard:
    """The record of one parameter's transfer: sent fingerprints by stored name, and the regions read back."""

    sent: dict[str, int] = field(default_factory=dict)
    arrived: list[Moved] = field(default_factory=list)


class LocalEngine:
    """One engine in this process.

    Args:
        llm: the engine.
        name: the engine's name, for messages.
        worker: its worker.
        share: let the engine use the trainer's memory if shape and dtype allow it.
    """

    def __init__(self, llm: Any, name: str, worker: compat.LocalWorker, share: bool) -> None:
        self.name = name
        self._llm = llm
        self.receiver = receiver_for(worker.model, worker.vllm_config)
        self.dtype = compat.engine_dtype(llm)
        self.exact = identity_of(getattr(worker.model, "context", None))
        self.computation = self.receiver.computation()
        self.tensor_size: int = worker.vllm_config.parallel_config.tensor_parallel_size
        # Captured CUDA graphs hold addresses, so parameters must keep their memory.
        self._share = share and bool(worker.vllm_config.model_config.enforce_eager)
        self.shared_bytes = 0

    def require_idle(self) -> None:
        """Raise if requests are unfinished; abort those that the model has refused, or whose forward has raised."""
        abort_failed_requests(self._llm, self.name)
        requests = compat.unfinished_requests(self._llm)
        if requests and self.receiver.guard.problem is not None:
            self._llm.llm_engine.abort_request(requests, internal=True)
        elif requests:
            raise WeightSyncError(
                f"{self.name} has {len(requests)} unfinished requests: their KV cache was computed with the "
                "old weights. Let them finish, or abort them, before a sync"
            )

    def begin(self, version: str) -> None:
        """Start an update; the engine refuses to generate until `finish`."""
        self.shared_bytes = 0
        self.receiver.begin(version)

    def loads_directly(self, table: WeightTable, tensor_rank: int, tensor_size: int) -> set[str]:
        """Return the stored names for which this process's trainer shard contains everything that its worker needs."""
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

    def load_shard(
        self,
        entry: WeightEntry,
        shard: torch.Tensor,
        tensor_rank: int,
        tensor_size: int,
        lasting: bool,
        names: Mapping[str, tuple[int, ...]],
    ) -> CopiedShard:
        """Load a parameter directly from the trainer's shard of it.

        Args:
            entry: the trainer's entry of the parameter.
            shard: the trainer's shard.
            tensor_rank: the trainer's position on its tensor axis.
            tensor_size: the size of the trainer's tensor axis.
            lasting: whether `shard` is the parameter itself and not a gathered copy.
            names: the stored tensors of the entry to load, with their shapes.

        Raises:
            WeightSyncError: a tensor does not fit the model, or a replicated region was read back with other bits.
        """
        receiver = self.receiver
        assert isinstance(receiver, ServedReceiver)
        wanted = [
            name for name in (receiver.resolve_name(sent, shape) for sent, shape in names.items()) if name is not None
        ]
        result = CopiedShard()
        if not wanted:
            return result
        target = receiver.targets[wanted[0]][0]
        if receiver.shares_memory_with(target, shard):
            self.shared_bytes += shard.nbytes
        elif self._can_share(target, entry, shard, tensor_rank, tensor_size, set(wanted), lasting):
            receiver.share(target, shard)  # shared, not copied, so nothing can differ
            self.shared_bytes += shard.nbytes
        else:
            flat = shard.detach().reshape(-1)
            memory = receiver.shard(target)
            for name in wanted:
                held = [region for region in regions(entry, tensor_rank, tensor_size) if region.name == name]
                # Sent values are read by the trainer's layout, and arrived values by the server's.
                prints = [fingerprint(r.view(flat).to(memory.dtype), r.offsets) for r in held if r.first]
                result.sent[name] = total(prints)
                for region in receiver.regions.get(name, []):
                    values = _cut(flat, region, held).to(memory.dtype)
                    moved = take_region(region, memory, values)
                    result.arrived.append(moved)
                    if not region.first and moved.print != fingerprint(values, region.offsets):
                        message = f"{name!r} arrived damaged in worker {receiver.rank} of {self.name}"
                        raise WeightSyncError(message, (name,), (receiver.rank,))
        for name in wanted:
            receiver.mark_received(name)
        return result

    def load(self, tensors: Mapping[str, torch.Tensor]) -> list[tuple[int, Moved]]:
        """Load full tensors; return the worker and the region read back for each region written."""
        receiver = self.receiver
        rank = receiver.rank if isinstance(receiver, ServedReceiver) else 0
        return [(rank, moved) for moved in receiver.load(tensors)]

    def finish(self, version: str, watch: Callable[[], str | None]) -> None:
        """Finish the update; the engine generates again."""
        self.receiver.finish()
        if self.shared_bytes:
            self.receiver.guard.accept(version, watch)
        self._llm.llm_engine.set_weight_version(version)
        if not compat.reset_caches(self._llm):
            self.receiver.guard.refuse(f"its prefix cache was not reset after the update to weights {version!r}")
            raise WeightSyncError(
                f"{self.name} did not reset its prefix cache, because requests are unfinished. Abort them, and sync "
                "again"
            )

    def close(self) -> None:
        """Do nothing: a local engine holds no resources."""

    def _can_share(
        self,
        target: WeightEntry,
        entry: WeightEntry,
        shard: torch.Tensor,
        tensor_rank: int,
        tensor_size: int,
        wanted: set[str],
        lasting: bool,
    ) -> bool:
        """Whether the engine can use the memory of the trainer's shard."""
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
            and (lasting or kind.only_packed)
        )


def abort_failed_requests(llm: Any, name: str) -> None:
    """Abort the requests that an engine had when a forward of its model raised: they would never end.

    Requests that were added later are left as they are. Engines in other processes die of such an error themselves.
    """
    worker = compat.local_worker(llm)
    guard = None if worker is None else getattr(worker.model, "weights", None)
    if not isinstance(guard, WeightGuard) or guard.failed is None:
        return
    aborted = compat.abort_requests_until(llm, guard.failed)
    guard.failed = None
    if aborted:
        logger.warning("%s: %d requests were aborted: a forward pass of the model raised an error", name, aborted)


@contextmanager
def abandoned_if_failed(llm: Any) -> Iterator[None]:
    """Abort all requests of an engine in this process if the calls inside this context raise, and drop its caches.

    The prefix cache names blocks that the failed step has not written.
    """
    try:
        yield
    except BaseException:
        if compat.local_worker(llm) is not None:
            llm.llm_engine.abort_request(compat.unfinished_requests(llm), internal=True)
            compat.reset_caches(llm)
        raise


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
