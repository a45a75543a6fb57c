"""`WeightSync`: a trainer's weights into running vLLM engines, without a restart and without a file.

In one process (or with torchrun's external launcher) memory goes to memory: an engine uses the trainer's own where
shape and dtype allow, packs its CPU layers straight from it, and copies the rest. Everything else, other sizes and
engines in processes of their own, passes in chunks through a bucket in shared memory: each trainer rank writes what it
holds, each worker reads what it needs, and nothing is gathered. Every tensor's fingerprint is compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.transfer.bucket import Bucket, Chunk, bucket_path, plan_chunks, remove_abandoned
from polyshard.adapters.vllm.transfer.guard import parameter_changes, shared_memory_watch
from polyshard.adapters.vllm.transfer.local import LocalEngine
from polyshard.adapters.vllm.transfer.remote import Client, LlmClient, RemoteEngine
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError, WeightSyncError
from polyshard.core.exact_identity import check_same_mode, identity_of
from polyshard.core.ranks import Ranks
from polyshard.core.weight_table import WeightTable, collect_layouts, stored_shape
from polyshard.weights.fingerprint import fingerprint, text, total
from polyshard.weights.movement import Moved, module_pieces, put_pieces, rectangle, shared_run

DEFAULT_BUCKET_BYTES = 256 << 20

Arrived = tuple[int, int, Moved]  # engine, worker, what stands there


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What one sync did, as this rank saw it.

    Attributes:
        version: of the weights.
        tensors: how many stored tensors.
        nbytes: of the whole model, in the engine's dtype.
        shared_bytes: of the trainer's memory that this process's engines use without a copy of their own, or packed
            straight from it.
        seconds: wall time.
    """

    version: str
    tensors: int
    nbytes: int
    shared_bytes: int
    seconds: float


class WeightSync:
    """Call it after a training step. Every trainer rank makes one, and calls it.

    Args:
        model: a training engine, or a model as its factory built it.
        parallel_context: the context that the model was built with.
        engines: `vllm.LLM`s. An engine in this process is given on every rank that runs one (all ranks, under the
            external launcher); one in processes of its own is given on the first rank alone, and was started with
            `weight_transfer_config={"backend": "polyshard"}`. Other ranks give none.
        bucket_bytes: of shared memory, for what cannot go from memory to memory; at least the largest tensor.
        timeout: seconds after which an engine that does not answer is an error that names the worker.
        share: let an engine in this process use the trainer's memory. It then refuses to generate between a step and
            the next sync.

    Raises:
        ConfigurationError: an engine cannot take weights, the engines have different dtypes, or one of trainer and
            engine alone is in exact mode.
        WeightSyncError: the engines' weights are not those of the trainer.
    """

    def __init__(
        self,
        model: nn.Module | Any,
        parallel_context: ParallelContext,
        engines: Any | Sequence[Any] | None = None,
        *,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        timeout: float = 600.0,
        share: bool = True,
    ) -> None:
        if bucket_bytes < 1:
            raise ConfigurationError(f"bucket_bytes must be positive, got {bucket_bytes}")
        self._engine = None if isinstance(model, nn.Module) else model
        self._module: nn.Module = model if self._engine is None else self._engine.module
        self._table: WeightTable = collect_layouts(model) if self._engine is None else self._engine.table
        self._context = parallel_context
        self._ranks = Ranks.of(parallel_context)
        self._axis = parallel_context.axis("tensor")
        self._shapes = {
            name: stored_shape(entry.layout, len(entry.checkpoint_names), index)
            for entry in self._table.values()
            for index, name in enumerate(entry.checkpoint_names)
        }
        self._local: list[LocalEngine] = []
        self._remote: list[RemoteEngine] = []
        error: Exception | None = None
        try:
            remove_abandoned()
            self._connect(engines, timeout, share)
            for connected in (*self._local, *self._remote):
                check_same_mode(identity_of(parallel_context), connected.exact, connected.name)
        except Exception as problem:
            error = problem
        self._ranks.agree(error, "the engines cannot take weights", WeightSyncError)
        self.dtype = self._common_dtype()
        kinds = [(True, e.tensor_size) for e in self._local] + [(False, e.tensor_size) for e in self._remote]
        self._kinds: list[tuple[bool, int]] = max(self._ranks.gather(kinds), key=len)
        self._direct = self._reached_directly()
        staged = [(name, shape) for name, shape in self._shapes.items() if name not in self._direct]
        self._chunks = plan_chunks(staged, self.dtype.itemsize, bucket_bytes)
        self._bucket = self._make_bucket() if self._chunks else None
        self._count = 0

    def __call__(self, version: str | None = None) -> SyncReport:
        """Bring all engines to the trainer's weights of this moment. A collective.

        Args:
            version: a name for them, which the engine then tells; default counts up.

        Raises:
            WeightSyncError: an engine has unfinished requests, did not answer, or holds other values than were sent;
                it refuses to generate until a sync is complete. The message names the tensor and the worker.
            RankFailureError: a trainer rank died.
        """
        started = time.perf_counter()
        self._count += 1
        name = str(self._count) if version is None else version
        self._together(lambda: [engine.require_idle() for engine in (*self._local, *self._remote)], "sync refused")
        try:
            self._together(lambda: [engine.begin(name) for engine in (*self._local, *self._remote)], "sync failed")
            self._send_directly()
            self._send_in_chunks(name)
            watch = self._watch()
            self._together(lambda: [engine.finish(name, watch) for engine in self._local], "sync failed")
            self._together(lambda: [engine.finish(name) for engine in self._remote], "sync failed")
        except BaseException:
            for engine in self._remote:
                engine.abandon(name)
            raise
        return SyncReport(
            version=name,
            tensors=len(self._shapes),
            nbytes=sum(torch.Size(shape).numel() for shape in self._shapes.values()) * self.dtype.itemsize,
            shared_bytes=sum(engine.shared_bytes for engine in self._local),
            seconds=time.perf_counter() - started,
        )

    def close(self) -> None:
        """Release the shared memory; the engines go on with the weights that they have."""
        if self._bucket is not None:
            self._bucket.close()
        for engine in (*self._local, *self._remote):
            engine.close()

    def __enter__(self) -> WeightSync:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self, engines: Any | Sequence[Any] | None, timeout: float, share: bool) -> None:
        given = [] if engines is None else list(engines) if isinstance(engines, (list, tuple)) else [engines]
        for index, engine in enumerate(given):
            name = f"engine {index}"
            if hasattr(engine, "call") and hasattr(engine, "forget_cached"):
                client: Client = engine
            else:
                worker = compat.local_worker(engine)
                if worker is not None:
                    self._local.append(LocalEngine(engine, name, worker, share))
                    continue
                client = LlmClient(engine, name)
            if self._ranks.rank:
                raise ConfigurationError(
                    f"{name} runs in processes of its own: give it on the first trainer rank alone, not on rank "
                    f"{self._ranks.rank}"
                )
            self._remote.append(RemoteEngine(client, timeout))

    def _common_dtype(self) -> torch.dtype:
        found = {
            dtype for part in self._ranks.gather([e.dtype for e in (*self._local, *self._remote)]) for dtype in part
        }
        if len(found) != 1:
            raise ConfigurationError(
                f"the engines have {sorted(map(str, found)) or 'no'} dtypes: give one engine or several of one dtype, "
                "and make a WeightSync for each dtype"
            )
        return found.pop()

    def _reached_directly(self) -> set[str]:
        """Stored names that every worker finds in its own process."""
        sets = [engine.reaches(self._table, self._axis.rank, self._axis.size) for engine in self._local]
        if self._remote:
            sets.append(set())
        everyone = self._ranks.gather(set.intersection(*sets) if sets else None)
        return set.intersection(*(part for part in everyone if part is not None))

    def _make_bucket(self) -> Bucket:
        size = max(chunk.nbytes for chunk in self._chunks)
        path = self._ranks.first(str(bucket_path()))
        made: list[Bucket] = []
        for creating in (True, False):
            error: Exception | None = None
            if creating == (self._ranks.rank == 0):
                try:
                    made.append(Bucket(path, size, create=creating))
                except WeightSyncError as problem:
                    error = problem
            self._ranks.agree(error, "no shared memory", WeightSyncError)
        return made[0]

    def _together(self, action: Callable[[], object], what: str) -> None:
        error: Exception | None = None
        try:
            action()
        except Exception as problem:
            error = problem
        self._ranks.agree(error, what, WeightSyncError)

    def _watch(self) -> Callable[[], str | None]:
        changes: Callable[[], int]
        if self._engine is None:
            changes = parameter_changes(self._module)
        else:
            engine = self._engine
            changes = lambda: engine.updates  # noqa: E731
        return shared_memory_watch(changes, "the last sync")

    def _send_directly(self) -> None:
        """From the shards in this process; ranks go through the parameters in step, since gathering is a collective."""
        if not self._direct:
            return
        parameters = dict(self._module.named_parameters())
        weights = (
            ((name, parameter.detach()) for name, parameter in parameters.items())
            if self._engine is None
            else self._engine.weights()
        )
        error: Exception | None = None
        sent: dict[tuple[int, str], int] = {}
        arrived: list[Arrived] = []
        for name, shard in weights:
            entry = self._table[name]
            wanted = {n: self._shapes[n] for n in entry.checkpoint_names if n in self._direct}
            if not wanted or error is not None:
                continue
            lasting = shard.data_ptr() == parameters[name].data_ptr()
            try:
                for number, engine in enumerate(self._local):
                    copied = engine.take_shard(entry, shard, self._axis.rank, self._axis.size, lasting, wanted)
                    sent.update({(number, stored): print_ for stored, print_ in copied.sent.items()})
                    arrived += [(number, self._axis.rank, moved) for moved in copied.arrived]
            except Exception as problem:
                error = problem
        self._ranks.agree(error, "sync failed", WeightSyncError)
        mine = (self._axis.rank, sent, arrived)
        self._together(partial(self._compare_direct, self._ranks.gather(mine)), "sync failed")

    def _compare_direct(self, everywhere: list[tuple[int, dict[tuple[int, str], int], list[Arrived]]]) -> None:
        """Each engine's workers together hold what the trainer's ranks beside them together hold."""
        sent: dict[tuple[int, int, str], dict[int, int]] = {}  # by engine, copy and tensor; by trainer tensor rank
        found: dict[tuple[int, int, str], int] = {}
        for rank, (tensor_rank, prints, arrived) in enumerate(everywhere):
            for (number, name), print_ in prints.items():
                parts = sent.setdefault((number, rank // self._kinds[number][1], name), {})
                if parts.setdefault(tensor_rank, print_) != print_:
                    told = f"{name!r}: data-parallel ranks of the trainer hold different values (rank {rank} is one)"
                    raise WeightSyncError(told, (name,))
            for number, _, moved in arrived:
                if moved.first:
                    key = (number, rank // self._kinds[number][1], moved.name)
                    found[key] = total((found.get(key, 0), moved.print))
        for key, parts in sent.items():
            want = total(parts.values())
            if want != found.get(key):
                (number, copy, name), size = key, self._kinds[key[0]][1]
                raise WeightSyncError(
                    f"{name!r} arrived damaged in the workers on ranks {list(range(copy * size, copy * size + size))} "
                    f"of engine {number}: sent {text(want)}, found {text(found.get(key, 0))}",
                    (name,),
                    tuple(range(size)),
                )

    def _send_in_chunks(self, version: str) -> None:
        if not self._chunks:
            return
        assert self._bucket is not None
        pieces = self._module_or_engine_pieces()
        for index, chunk in enumerate(self._chunks):
            buffers = self._bucket.tensors(chunk, self.dtype)
            mine = put_pieces(pieces, self._table, self._axis.rank, self._axis.size, buffers)
            parts = self._ranks.gather(mine)  # and every rank has written
            sent = {name: total(part[name] for part in parts if name in part) for name in chunk.names}
            arrived: list[Arrived] = []
            error: Exception | None = None
            try:
                arrived = self._deliver(version, index, chunk, buffers)
            except Exception as problem:
                error = problem
            self._ranks.agree(error, "sync failed", WeightSyncError)
            everywhere = self._ranks.gather(arrived)  # and every worker has read
            self._together(partial(self._compare, sent, everywhere, buffers), "sync failed")

    def _deliver(self, version: str, index: int, chunk: Chunk, buffers: dict[str, torch.Tensor]) -> list[Arrived]:
        assert self._bucket is not None
        arrived: list[Arrived] = []
        for number, engine in enumerate(self._local):
            arrived += [(number, worker, moved) for worker, moved in engine.take(buffers)]
        for number, engine in enumerate(self._remote, start=len(self._local)):
            arrived += [(number, worker, moved) for worker, moved in engine.take(version, index, chunk, self._bucket)]
        return arrived

    def _compare(self, sent: dict[str, int], everywhere: list[list[Arrived]], buffers: dict[str, torch.Tensor]) -> None:
        """Each engine's workers together hold what the trainer's ranks together sent."""
        found: dict[tuple[int, int], dict[str, int]] = {}  # engine, and which of its copies
        for rank, part in enumerate(everywhere):
            for number, worker, moved in part:
                if moved.first:
                    here, size = self._kinds[number]
                    copy = (rank if here else worker) // size
                    sums = found.setdefault((number, copy), {})
                    sums[moved.name] = total((sums.get(moved.name, 0), moved.print))
        wrong = {name for sums in found.values() for name in sent if sums.get(name) != sent[name]}
        held_alike = [m for m in everywhere[self._ranks.rank] if not m[2].first]
        suspects = [m for part in everywhere for m in part if m[2].name in wrong] + held_alike
        for number, worker, moved in suspects:
            want = fingerprint(rectangle(buffers[moved.name], moved.offsets, moved.sizes), moved.offsets)
            if moved.print != want:
                raise WeightSyncError(
                    f"{moved.name!r} arrived damaged in worker {worker} of engine {number}: sent {text(want)}, "
                    f"found {text(moved.print)} at {list(moved.offsets)}",
                    (moved.name,),
                    (worker,),
                )
        if wrong:
            name = min(wrong)
            raise WeightSyncError(
                f"{name!r} did not pass through the bucket as the trainer wrote it ({text(sent[name])})", tuple(wrong)
            )

    def _module_or_engine_pieces(self) -> list[tuple[Any, int, int]]:
        found = module_pieces(self._module, self._context) if self._engine is None else self._engine.weight_pieces()
        rank, size = self._axis.rank, self._axis.size
        return [
            (piece, *shared_run(piece, self._table[piece.parameter].layout.local_shape(rank, size))) for piece in found
        ]
