"""`WeightSync`: transfer of a trainer's weights into running vLLM engines, without a restart or a file.

In one process (or with torchrun's external launcher) weights move within memory. The engine shares the trainer's memory
if shape and dtype allow it, packs its CPU layers directly from it, and copies the rest. For different tensor-parallel
sizes and for engines in separate processes, weights move in chunks through a bucket in shared memory. Each trainer rank
writes its shards and each worker reads its own, without gathering. Engines that are given as clients may be on other
machines: each trainer rank sends to each worker what that worker keeps. The fingerprint of every tensor is compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from polyshard.adapters.vllm.clients.protocol import Client, is_client, listed_engines
from polyshard.adapters.vllm.transfer.bucket import Bucket, Chunk, bucket_path, plan_chunks, remove_abandoned
from polyshard.adapters.vllm.transfer.guard import shared_memory_watch
from polyshard.adapters.vllm.transfer.link import CHUNK_BYTES
from polyshard.adapters.vllm.transfer.network import NetworkLeg
from polyshard.adapters.vllm.transfer.remote import RemoteEngine
from polyshard.adapters.vllm.transfer.report import SyncReport
from polyshard.adapters.vllm.transfer.verification import Arrived, DirectRecord, EngineKind, verify_chunk, verify_direct
from polyshard.checkpoint.part import without_part
from polyshard.core.computation import check_same_computation, whole_computation
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError, WeightSyncError
from polyshard.core.exact_identity import check_same_mode, identity_of
from polyshard.core.pieces import Piece
from polyshard.core.ranks import Ranks
from polyshard.core.weight_table import stored_shape
from polyshard.weights.fingerprint import total
from polyshard.weights.movement import put_pieces, shared_run
from polyshard.weights.view import view_weights

if TYPE_CHECKING:
    from polyshard.adapters.vllm.transfer.local import LocalEngine

DEFAULT_BUCKET_BYTES = 256 << 20

T = TypeVar("T")


class WeightSync:
    """A callable that sends a trainer's weights to vLLM engines; every trainer rank creates one, and calls it.

    Args:
        model: a training engine, or a model that its factory built. Of a model with a LoRA adapter, the frozen weights
            are sent; `LoraSync` sends the adapter.
        parallel_context: the context that the model was built with.
        engines: `vllm.LLM` objects. Pass an engine in this process on every rank that runs one (with the external
            launcher, all ranks). Pass an engine in separate processes only on the first rank, and start it with
            `weight_transfer_config={"backend": "polyshard"}`. Other ranks pass none. Clients of engines (`HttpClient`,
            `RayClient`, `LlmClient`) receive over the network; any rank may pass them, and the first rank's are called.
        bucket_bytes: size of the shared memory for weights that cannot move within one process's memory. A larger
            tensor enlarges it. Over the network, messages have at most 16 MiB, and at most this size.
        timeout: seconds after which an unresponsive engine is an error that names the worker.
        share: let an engine in this process use the trainer's memory. It then refuses to generate between a training
            step and the next sync.
        interface: for clients, the network interface of this rank over which weights are sent, by name (`eth0`) or by
            its address. By default `GLOO_SOCKET_IFNAME`, or the interface on the route to the engine.

    Raises:
        ConfigurationError: an engine cannot receive weights, the engines have different dtypes, only one of trainer
            and engine is in exact mode, or a layer computes with other settings, such as the experts per token.
        WeightSyncError: the engine's model does not match the trainer's weights.

    Examples:
        >>> with ps.WeightSync(engine, context, llm) as sync:  # needs vLLM  # doctest: +SKIP
        ...     report = sync()
        ...     print(f"{report.tensors} tensors in {report.seconds:.1f} s")
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
        interface: str | None = None,
    ) -> None:
        if bucket_bytes < 1:
            raise ConfigurationError(f"bucket_bytes must be positive, got {bucket_bytes}")
        self._view = without_part(view_weights(model, parallel_context))
        self._ranks = Ranks.of(parallel_context)
        self._axis = parallel_context.axis("tensor")
        self._shapes = {
            name: stored_shape(entry.layout, len(entry.checkpoint_names), index)
            for entry in self._view.table.values()
            for index, name in enumerate(entry.checkpoint_names)
        }
        self._local: list[LocalEngine] = []
        self._remote: list[RemoteEngine] = []

        given = [] if engines is None else listed_engines(engines)
        clients = [engine for engine in given if is_client(engine)]
        computation = whole_computation(self._view.module, self._view.table, parallel_context)
        self._network = NetworkLeg(
            self._view, parallel_context, self._shapes, computation, timeout, interface, min(bucket_bytes, CHUNK_BYTES)
        )
        self._network.join(clients)

        def connect() -> None:
            remove_abandoned()
            self._connect([engine for engine in given if not is_client(engine)], timeout, share)
            for connected in (*self._local, *self._remote):
                check_same_mode(identity_of(parallel_context), connected.exact, connected.name)
                check_same_computation(computation, connected.computation, ("the trainer", connected.name))

        self._ranks.run_on_all(connect, "the engines cannot take weights", WeightSyncError)
        self._dtype = self._common_dtype()
        kinds = [EngineKind(True, e.tensor_size) for e in self._local]
        kinds += [EngineKind(False, e.tensor_size) for e in self._remote]
        self._kinds: list[EngineKind] = max(self._ranks.gather(kinds), key=len)
        self._direct = self._reached_directly()
        staged = [(name, shape) for name, shape in self._shapes.items() if name not in self._direct]
        self._chunks = [] if self._dtype is None else plan_chunks(staged, self._dtype.itemsize, bucket_bytes)
        self._bucket = self._make_bucket() if self._chunks else None
        self._count = 0

    def __call__(self, version: str | None = None) -> SyncReport:
        """Send the trainer's current weights to all engines. A collective.

        Args:
            version: a name for the weights, which the engines report; by default a number that counts up.

        Raises:
            WeightSyncError: an engine has unfinished requests, did not answer, or holds other values than were sent.
                The message names the tensor and the worker. The engine refuses to generate until a sync completes.
            RankFailureError: a trainer rank died.
        """
        started = time.perf_counter()
        self._count += 1
        name = str(self._count) if version is None else version
        self._together(lambda: [engine.require_idle() for engine in (*self._local, *self._remote)], "sync refused")
        try:
            self._together(lambda: [engine.begin(name) for engine in (*self._local, *self._remote)])
            self._send_directly()
            self._send_in_chunks(name)
            watch = shared_memory_watch(self._view.changes, "the last sync")
            self._together(lambda: [engine.finish(name, watch) for engine in self._local])
            self._together(lambda: [engine.finish(name) for engine in self._remote])
            self._network.send(name)
        except BaseException:
            for engine in self._remote:
                engine.abandon(name)
            raise
        return SyncReport(
            version=name,
            tensors=len(self._shapes),
            nbytes=sum(torch.Size(shape).numel() for shape in self._shapes.values()) * self._itemsize,
            shared_bytes=sum(engine.shared_bytes for engine in self._local),
            seconds=time.perf_counter() - started,
        )

    @property
    def engines(self) -> tuple[str, ...]:
        """The names of the engines that are reached over the network."""
        return self._network.names

    def join(self, *clients: Client) -> None:
        """Add engines that are reached over the network; the next sync sends to them, too. A collective."""
        self._network.join(clients)

    def leave(self, name: str) -> None:
        """Remove an engine that is reached over the network; it keeps its weights. Every rank must call it.

        Raises:
            ConfigurationError: there is no engine of this name.
        """
        self._network.leave(name)

    def close(self) -> None:
        """Release the shared memory and all connections; the engines keep their weights."""
        self._network.close()
        if self._bucket is not None:
            self._bucket.close()
        for engine in (*self._local, *self._remote):
            engine.close()

    def __enter__(self) -> WeightSync:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _itemsize(self) -> int:
        dtype = self._dtype or self._network.dtype
        assert dtype is not None
        return dtype.itemsize

    def _connect(self, engines: Sequence[Any], timeout: float, share: bool) -> None:
        if not engines:
            return  # a trainer whose engines are all elsewhere needs no vLLM
        from polyshard.adapters.vllm import compat
        from polyshard.adapters.vllm.clients.local import LlmClient
        from polyshard.adapters.vllm.transfer.local import LocalEngine

        for index, engine in enumerate(engines):
            name = f"engine {index}"
            worker = compat.local_worker(engine)
            if worker is not None:
                self._local.append(LocalEngine(engine, name, worker, share))
                continue
            if self._ranks.rank:
                raise ConfigurationError(
                    f"{name} runs in separate processes, but was passed on rank {self._ranks.rank}. Pass it only "
                    "on the first trainer rank"
                )
            self._remote.append(RemoteEngine(LlmClient(engine, name), timeout))

    def _common_dtype(self) -> torch.dtype | None:
        """Return the dtype of the engines on this machine; None if all engines are clients."""
        found = {
            dtype for part in self._ranks.gather([e.dtype for e in (*self._local, *self._remote)]) for dtype in part
        }
        if not found and self._network.names:
            return None
        if len(found) != 1:
            raise ConfigurationError(
                f"the engines must have one dtype: got {', '.join(sorted(map(str, found))) or 'no engines'}. Pass at "
                "least one engine, and create a WeightSync for each dtype"
            )
        return found.pop()

    def _reached_directly(self) -> set[str]:
        """Return the stored names that every worker can load from the trainer shard in its process."""
        if self._dtype is None:
            return set()
        sets = [
            engine.loads_directly(self._view.local_table, self._axis.rank, self._axis.size) for engine in self._local
        ]
        if self._remote:
            sets.append(set())
        everyone = self._ranks.gather(set.intersection(*sets) if sets else None)
        return set.intersection(*(part for part in everyone if part is not None))

    def _make_bucket(self) -> Bucket:
        size = max(chunk.nbytes for chunk in self._chunks)
        path = self._ranks.broadcast(str(bucket_path()))

        def make(creating: bool) -> Bucket | None:
            mine = creating == (self._ranks.rank == 0)
            return Bucket(path, size, create=creating) if mine else None

        # The first rank creates it before the others open it.
        made = [self._ranks.run_on_all(partial(make, c), "no shared memory", WeightSyncError) for c in (True, False)]
        return next(bucket for bucket in made if bucket is not None)

    def _together(self, action: Callable[[], T], what: str = "sync failed") -> T:
        return self._ranks.run_on_all(action, what, WeightSyncError)

    def _send_directly(self) -> None:
        """Load from the shards in this process; all ranks iterate in step, because gathering is a collective."""
        if not self._direct:
            return
        parameters = dict(self._view.module.named_parameters())
        error: Exception | None = None
        sent: dict[tuple[int, str], int] = {}
        arrived: list[Arrived] = []
        for name, shard in self._view.shards():
            entry = self._view.table[name]
            wanted = {n: self._shapes[n] for n in entry.checkpoint_names if n in self._direct}
            if not wanted or error is not None:
                continue  # also after an error, since all ranks must take part in every gather
            lasting = shard.data_ptr() == parameters[name].data_ptr()
            try:
                for number, engine in enumerate(self._local):
                    copied = engine.load_shard(entry, shard, self._axis.rank, self._axis.size, lasting, wanted)
                    sent.update({(number, stored): print_ for stored, print_ in copied.sent.items()})
                    arrived += [(number, self._axis.rank, moved) for moved in copied.arrived]
            except Exception as problem:
                error = problem
        self._ranks.raise_on_all(error, "sync failed", WeightSyncError)
        everywhere = self._ranks.gather(DirectRecord(self._axis.rank, sent, arrived))
        self._together(partial(verify_direct, everywhere, self._kinds))

    def _send_in_chunks(self, version: str) -> None:
        if not self._chunks:
            return
        assert self._bucket is not None
        assert self._dtype is not None
        pieces = self._pieces()
        for index, chunk in enumerate(self._chunks):
            buffers = self._bucket.tensors(chunk, self._dtype)
            mine = put_pieces(pieces, self._view.table, self._axis.rank, self._axis.size, buffers)
            parts = self._ranks.gather(mine)  # also a barrier: every rank has written
            sent = {name: total(part[name] for part in parts if name in part) for name in chunk.names}
            arrived = self._together(partial(self._deliver, version, index, chunk, buffers))
            everywhere = self._ranks.gather(arrived)  # also a barrier: every worker has read
            self._together(partial(verify_chunk, sent, everywhere, buffers, self._kinds, self._ranks.rank))

    def _deliver(self, version: str, index: int, chunk: Chunk, buffers: dict[str, torch.Tensor]) -> list[Arrived]:
        assert self._bucket is not None
        arrived: list[Arrived] = []
        for number, engine in enumerate(self._local):
            arrived += [(number, worker, moved) for worker, moved in engine.load(buffers)]
        for number, engine in enumerate(self._remote, start=len(self._local)):
            arrived += [(number, worker, moved) for worker, moved in engine.load(version, index, chunk, self._bucket)]
        return arrived

    def _pieces(self) -> list[tuple[Piece, int, int]]:
        """Return this rank's pieces, each with the range of elements that this rank writes."""
        rank, size, table = self._axis.rank, self._axis.size, self._view.table
        return [
            (piece, *shared_run(piece, table[piece.parameter].layout.local_shape(rank, size)))
            for piece in self._view.owned_pieces()
        ]
