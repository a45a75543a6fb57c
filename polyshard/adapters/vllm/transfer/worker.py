"""The weight transfer backend in vLLM's workers: `weight_transfer_config={"backend": "polyshard"}`.

vLLM's calls (`start_weight_update`, `update_weights`, `finish_weight_update`) drive it. Weights arrive through a bucket
in shared memory. Because the calls return nothing, each worker reports through a small file.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from polyshard.adapters.vllm.compat import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from polyshard.adapters.vllm.transfer.bucket import Bucket, chunk_from
from polyshard.adapters.vllm.transfer.receiver import Receiver, receiver_for
from polyshard.core.errors import WeightSyncError
from polyshard.core.exact_identity import identity_of
from polyshard.weights.movement import Moved


@dataclass
class InitInfo(WeightTransferInitInfo):
    """The folder where workers write their reports."""

    reports: str = ""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One chunk, or the notice that the trainer abandons the update."""

    version: str = ""
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
        self._reports: Path | None = None
        self._version: str | None = None
        self._open = False
        self._failed: str | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Connect to a trainer."""
        self._reports = Path(init_info.reports)
        self._report("ready", -1)

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
            if self._version is None:
                self._version = update_info.version
                self._receiver.begin(update_info.version)
            chunk = chunk_from(update_info.chunk, update_info.nbytes)
            bucket = Bucket(update_info.path, update_info.nbytes)
            moved = self._receiver.load(bucket.tensors(chunk, getattr(torch, update_info.dtype)))
            self._report("loaded", update_info.index, moved)

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
        self._reports = None

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
            self._report("failed", index, error=str(error))

    def _report(self, state: str, index: int, moved: list[Moved] | None = None, error: str | None = None) -> None:
        if self._reports is None:
            return
        report = {
            "state": state,
            "index": index,
            "time": time.time(),
            "moved": [asdict(m) for m in moved or ()],
            "error": error,
            "rank": self._rank,
            "open": self._open,
            "pid": os.getpid(),
            "tensor_size": self.parallel_config.tensor_parallel_size,
            "workers": self.parallel_config.data_parallel_size * self.parallel_config.world_size,
            "dtype": str(self.model_config.dtype).removeprefix("torch."),
            "exact": self._exact,
        }
        path = self._reports / f"worker-{self._rank:05d}.json"
        temporary = path.with_suffix(".writing")
        temporary.write_text(json.dumps(report))
        os.replace(temporary, path)
