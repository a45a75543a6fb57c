"""The weight transfer backend in vLLM's workers: `weight_transfer_config={"backend": "polyshard"}`.

vLLM's calls (`start_weight_update`, `update_weights`, `finish_weight_update`) drive it. Weights arrive through a bucket
in shared memory, or over the network. Because the calls return nothing, each worker reports through a small file, or
through the store of the network's process group.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.compat import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from polyshard.adapters.vllm.transfer.bucket import Bucket, chunk_from
from polyshard.adapters.vllm.transfer.link import Link, local_address, open_store
from polyshard.adapters.vllm.transfer.network_receiver import NetworkReceiver, needs_of
from polyshard.adapters.vllm.transfer.receiver import Receiver, receiver_for
from polyshard.core.computation import Computation
from polyshard.core.errors import WeightSyncError
from polyshard.core.exact_identity import identity_of
from polyshard.weights.movement import Moved

logger = logging.getLogger(__name__)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """The folder where workers write their reports, or a trainer's store, to which they connect in two stages."""

    reports: str = ""
    stage: str = ""
    host: str = ""
    port: int = 0
    senders: int = 0
    timeout: float = 0.0


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One chunk, the call to receive all over the network, or the notice that the trainer abandons the update."""

    version: str = ""
    over_network: bool = False
    update: int = 0
    index: int = 0
    path: str = ""
    nbytes: int = 0
    dtype: str = ""
    chunk: dict[str, Any] = field(default_factory=dict)
    abandon: bool = False


class PolyshardTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """vLLM's `WeightTransferEngine` on polyshard's receivers."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._receiver: Receiver = receiver_for(model, vllm_config)
        parallel = vllm_config.parallel_config
        self._rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._exact = identity_of(getattr(model, "context", None))
        self._identity = uuid.uuid4().hex
        self._reports: Path | None = None
        self._link: Link | None = None
        self._network: NetworkReceiver | None = None
        self._version: str | None = None
        self._open = False
        self._failed: str | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Connect to a trainer."""
        if init_info.stage == "announce":
            self._announce(init_info)
        elif init_info.stage == "connect":
            self._connect()
        else:
            self._reports, self._link, self._network = Path(init_info.reports), None, None
            self._report("ready", -1, computation=self._receiver.computation())

    def _announce(self, info: InitInfo) -> None:
        """Tell a trainer what this worker keeps. If its store cannot be reached, it sees that nothing was written."""
        self._reports = self._link = self._network = None
        address = local_address(None, info.host)
        parallel = self.parallel_config
        workers = parallel.data_parallel_size * parallel.world_size
        try:
            store = open_store(info.host, info.port, info.timeout)
        except WeightSyncError as error:
            logger.error("worker %d: %s", self._rank, error)
            return
        number, size = info.senders + self._rank, info.senders + workers
        self._link = Link(store, number, size, info.timeout, address)
        dtype = compat.model_dtype(self.vllm_config)
        self._network = NetworkReceiver(self._link, self._receiver, self._rank, workers, info.senders, dtype)
        needs = needs_of(self._receiver)
        wanted = None if needs is None else [need.to_json() for need in needs]
        self._link.publish(
            f"ready/{self._rank}", {**self._facts(), "needs": wanted, "computation": self._receiver.computation()}
        )

    def _connect(self) -> None:
        """Join the trainer's group; the model keeps its weights if that fails."""
        try:
            assert self._network is not None
            self._network.connect()
            self._report("connected", -1)
        except Exception as error:
            self._report("failed", -1, error=str(error), tensors=getattr(error, "tensors", ()))

    def start_weight_update(self) -> None:
        """Start an update; the model refuses to compute. The first chunk brings the version."""
        self._version, self._open, self._failed = None, True, None
        self._receiver.guard.refuse("a weight update has begun and is not finished")
        self._report("started", -1)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load one chunk."""
        with self._reporting(update_info.index):
            if update_info.abandon:
                raise WeightSyncError(f"the update to weights {update_info.version!r} was abandoned by its trainer")
            if update_info.over_network:
                self._receive_over_network(update_info)
                return
            if self._version is None:
                self._version = update_info.version
                self._receiver.begin(update_info.version)
            chunk = chunk_from(update_info.chunk, update_info.nbytes)
            bucket = Bucket(update_info.path, update_info.nbytes)
            moved = self._receiver.load(bucket.tensors(chunk, getattr(torch, update_info.dtype)))
            self._report("loaded", update_info.index, moved)

    def _receive_over_network(self, info: UpdateInfo) -> None:
        assert self._network is not None
        assert self._link is not None
        self._version = info.version
        self._receiver.begin(info.version)
        try:
            self._network.receive(info.update)
        except BaseException:
            self._link.disconnect()
            raise
        self._report("loaded", info.index)

    def finish_weight_update(self) -> None:
        """Finish an update if all weights were received; a failed update leaves the model refusing to compute."""
        self._open = False
        with self._reporting(-1):
            if self._failed is not None:
                raise WeightSyncError(self._failed)
            if self._version is None:
                raise WeightSyncError("the weight update ended before any tensor was received")
            self._receiver.finish()
            self._report("finished", -1)

    def shutdown(self) -> None:
        """Disconnect from the trainer; nothing else is held between updates."""
        self._reports = self._link = self._network = None

    @contextmanager
    def _reporting(self, index: int) -> Iterator[None]:
        """Report a failure instead of raising it.

        When one worker raises, vLLM stops reading the answers of the others, and takes them for answers to its next
        call (0.32.0, v1/executor/multiproc_executor.py, get_response).
        """
        try:
            yield
        except Exception as error:
            self._failed = str(error)
            self._receiver.guard.refuse(f"its last weight update failed ({error})")
            self._report("failed", index, error=str(error), tensors=getattr(error, "tensors", ()))

    def _report(
        self,
        state: str,
        index: int,
        moved: list[Moved] | None = None,
        error: str | None = None,
        tensors: Sequence[str] = (),
        computation: Computation | None = None,
    ) -> None:
        report = {
            **self._facts(),
            "state": state,
            "index": index,
            "time": time.time(),
            "moved": [asdict(m) for m in moved or ()],
            "error": error,
            "tensors": list(tensors[:100]),
            "computation": computation,
        }
        if self._link is not None:
            try:
                self._link.publish(f"report/{self._rank}", report)
            except (dist.DistError, RuntimeError) as gone:  # with the first trainer rank
                logger.error("worker %d could not report %r to its trainer: %s", self._rank, state, gone)
        if self._reports is not None:
            path = self._reports / f"worker-{self._rank:05d}.json"
            temporary = path.with_suffix(".writing")
            temporary.write_text(json.dumps(report))
            os.replace(temporary, path)

    def _facts(self) -> dict[str, Any]:
        return {
            "rank": self._rank,
            "open": self._open,
            "pid": os.getpid(),
            "identity": self._identity,
            "tensor_size": self.parallel_config.tensor_parallel_size,
            "workers": self.parallel_config.data_parallel_size * self.parallel_config.world_size,
            "dtype": str(self.model_config.dtype).removeprefix("torch."),
            "exact": self._exact,
        }
