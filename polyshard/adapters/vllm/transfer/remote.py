"""An engine whose workers are other processes on this machine, driven through vLLM's weight-transfer calls."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from polyshard.adapters.vllm.clients.protocol import Client
from polyshard.adapters.vllm.transfer.bucket import Bucket, Chunk
from polyshard.core.computation import merged
from polyshard.core.errors import WeightSyncError
from polyshard.core.exact_identity import ExactIdentity
from polyshard.weights.movement import Moved


class RemoteEngine:
    """One engine in other processes.

    Args:
        client: the client that calls it.
        timeout: seconds after which a call that has not returned is an error that names the worker.
    """

    def __init__(self, client: Client, timeout: float) -> None:
        self.name = client.name
        self._client, self._timeout = client, timeout
        self._pending: threading.Thread | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="polyshard-reports-"))
        self._remove_folder = weakref.finalize(self, shutil.rmtree, self._folder, True)  # also at exit
        self._call("init_weight_transfer_engine", {"init_info": {"reports": str(self._folder)}})
        first = self._reports()[0]
        self.computation = merged(report["computation"] or {} for report in self._reports())
        self._workers: int = first["workers"]
        self.tensor_size: int = first["tensor_size"]
        self.dtype: torch.dtype = getattr(torch, first["dtype"])
        self.exact = None if first["exact"] is None else ExactIdentity(*first["exact"])
        # Whether an update has started and not finished; a trainer that died may have left one open.
        self._open: bool = any(report["open"] for report in self._reports())
        self._incomplete = self._open

    def require_idle(self) -> None:
        """Raise if requests are unfinished; abort them if a partially updated model has refused them."""
        requests = self._client.unfinished()
        if requests and self._incomplete:
            self._await_earlier_call("abort", -1, time.monotonic())
            self._client.abort(requests)
        elif requests:
            raise WeightSyncError(
                f"{self.name} has {len(requests)} unfinished requests: their KV cache was computed with the "
                "old weights. Let them finish, or abort them, before a sync"
            )

    def begin(self, version: str) -> None:
        """Start an update; the engine refuses to generate until `finish`."""
        if self._open:
            self._abandon_open_update(version)
        self._incomplete = self._open = True
        self._call("start_weight_update", None)

    def load(self, version: str, index: int, chunk: Chunk, bucket: Bucket) -> list[tuple[int, Moved]]:
        """Make every worker load a chunk; return the worker and the region read back for each region written."""
        info = {
            "version": version,
            "index": index,
            "path": str(bucket.path),
            "nbytes": bucket.nbytes,
            "dtype": str(self.dtype).removeprefix("torch."),
            "chunk": chunk.to_dict(),
        }
        self._call("update_weights", {"update_info": info}, index)
        reports = self._require("loaded", index)
        return [(report["rank"], _moved(fields)) for report in reports for fields in report["moved"]]

    def finish(self, version: str) -> None:
        """Finish the update; the engine generates again."""
        self._end()
        self._require("finished", -1)
        if not self._client.forget_cached(version):
            raise WeightSyncError(
                f"{self.name} did not reset its prefix cache, because requests are unfinished. Abort them, and sync "
                "again"
            )
        self._incomplete = False

    def abandon(self, version: str) -> None:
        """End a failed update; the engine refuses to generate until an update completes."""
        if self._open and not (self._pending and self._pending.is_alive()):
            with contextlib.suppress(WeightSyncError):  # the first error is the one to raise
                self._abandon_open_update(version)

    def _abandon_open_update(self, version: str) -> None:
        # All tensors may have arrived, and some may be damaged, which the workers cannot know.
        self._call("update_weights", {"update_info": {"version": version, "abandon": True}})
        self._end()

    def _end(self) -> None:
        self._call("finish_weight_update", None)
        self._open = False

    def close(self) -> None:
        """Release the reports; the engine keeps its weights."""
        self._remove_folder()

    def _require(self, state: str, index: int) -> list[dict[str, Any]]:
        """Return every worker's report; raise if a worker is not in this state."""
        reports = self._reports()
        others = [report for report in reports if (report["state"], report["index"]) != (state, index)]
        if others or len(reports) < self._workers:
            details = "; ".join(f"worker {r['rank']}: {r['error'] or 'is ' + r['state']}" for r in others)
            raise WeightSyncError(
                f"{self.name}: {details or 'a worker did not report'}", (), tuple(report["rank"] for report in others)
            )
        return reports

    def _call(self, method: str, payload: Mapping[str, Any] | None, index: int = -1) -> None:
        errors: list[BaseException] = []

        def run() -> None:
            try:
                self._client.call(method, payload)
            except BaseException as error:
                errors.append(error)

        started = time.monotonic()
        self._await_earlier_call(method, index, started)
        self._pending = thread = threading.Thread(target=run, name=f"polyshard-{method}", daemon=True)
        thread.start()
        while thread.is_alive() and time.monotonic() - started < self._timeout:
            thread.join(1.0)
            gone = [r for r in self._reports() if _process_state(r["pid"]) == "gone"]
            if thread.is_alive() and gone:
                thread.join(2.0)  # vLLM reports the death itself, with a delay
                break
        if thread.is_alive():
            raise self._error(method, index, time.monotonic() - started, "no answer")
        if errors:
            raise self._error(method, index, time.monotonic() - started, _first_line(errors[0])) from errors[0]

    def _await_earlier_call(self, method: str, index: int, started: float) -> None:
        """Raise if an earlier call is unanswered after the timeout, or a worker died; vLLM answers calls in order."""
        pending = self._pending
        while pending is not None and pending.is_alive():
            pending.join(1.0)
            waited = time.monotonic() - started
            gone = any(_process_state(report["pid"]) == "gone" for report in self._reports())
            if pending.is_alive() and (waited > self._timeout or gone):
                raise self._error(method, index, waited, "an earlier call is still unanswered")

    def _error(self, method: str, index: int, waited: float, seen: str) -> WeightSyncError:
        problems, ranks = [], []
        for report in self._reports():
            state = _process_state(report["pid"])
            if report["state"] == "failed":
                problems.append(f"worker {report['rank']}: {report['error']}")
            elif state == "gone":
                problems.append(f"worker {report['rank']} (process {report['pid']}) is dead")
            elif state == "stopped":
                problems.append(f"worker {report['rank']} (process {report['pid']}) is stopped")
            elif method == "update_weights" and report["index"] != index:
                problems.append(f"worker {report['rank']} has not loaded chunk {index}")
            else:
                continue
            ranks.append(report["rank"])
        about = "; ".join(problems) or "all workers are alive"
        message = f"{self.name}: {method} failed after {waited:.1f} s: {about}; vLLM: {seen}"
        return WeightSyncError(message, (), tuple(ranks))

    def _reports(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self._folder.glob("worker-*.json"))]


def _moved(fields: dict[str, Any]) -> Moved:
    return Moved(fields["name"], tuple(fields["offsets"]), tuple(fields["sizes"]), fields["first"], fields["print"])


def _process_state(pid: int) -> str:
    """Return `running`, `stopped` or `gone` (which includes zombies)."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone" if Path("/proc/self").exists() else "running"
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(letter, "running")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
