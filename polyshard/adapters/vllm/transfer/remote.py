"""An engine whose workers are other processes of this machine, driven through vLLM's weight-transfer calls."""

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
from typing import Any, Protocol

import torch

from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.transfer.bucket import Bucket, Chunk
from polyshard.core.errors import ConfigurationError, WeightSyncError
from polyshard.core.exact_identity import ExactIdentity
from polyshard.weights.movement import Moved

BACKEND = "polyshard"


class Client(Protocol):
    """How an engine is called."""

    name: str

    def call(self, method: str, payload: Mapping[str, Any] | None) -> None:
        """One of vLLM's weight-transfer methods on every worker; blocks."""
        ...

    def unfinished(self) -> list[str]:
        """Ids of requests that are under way, as far as can be told."""
        ...

    def abort(self, requests: list[str]) -> None:
        """Drop requests."""
        ...

    def forget_cached(self, version: str) -> bool:
        """Empty the prefix cache, and tell the engine its weights' version; False where requests are under way."""
        ...


class LlmClient:
    """A `vllm.LLM` in this process."""

    def __init__(self, llm: Any, name: str) -> None:
        config = llm.llm_engine.vllm_config.weight_transfer_config
        if config is None or config.backend != BACKEND:
            raise ConfigurationError(
                f"{name} was started with weight_transfer_config={config!r}: start it with "
                f"LLM(..., weight_transfer_config={{'backend': '{BACKEND}'}})"
            )
        self.name = name
        self._llm = llm

    def call(self, method: str, payload: Mapping[str, Any] | None) -> None:
        """By vLLM's collective_rpc."""
        self._llm.llm_engine.collective_rpc(method, kwargs=dict(payload or {}))

    def unfinished(self) -> list[str]:
        """Those that this process has sent."""
        return compat.unfinished_requests(self._llm)

    def abort(self, requests: list[str]) -> None:
        """Drop requests."""
        self._llm.llm_engine.abort_request(requests, internal=True)

    def forget_cached(self, version: str) -> bool:
        """Empty the prefix cache."""
        self._llm.llm_engine.set_weight_version(version)
        return bool(self._llm.llm_engine.reset_prefix_cache())


class RemoteEngine:
    """One engine, from outside.

    Args:
        client: how it is called.
        timeout: seconds after which a call that has not returned is an error that names the worker.
    """

    def __init__(self, client: Client, timeout: float) -> None:
        self.name = client.name
        self._client, self._timeout = client, timeout
        self._pending: threading.Thread | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="polyshard-reports-"))
        self._remove_folder = weakref.finalize(self, shutil.rmtree, self._folder, True)  # at exit, too
        self._call("init_weight_transfer_engine", {"init_info": {"reports": str(self._folder)}})
        first = self._reports()[0]
        self._workers: int = first["workers"]
        self.tensor_size: int = first["tensor_size"]
        self.dtype: torch.dtype = getattr(torch, first["dtype"])
        self.exact = None if first["exact"] is None else ExactIdentity(*first["exact"])
        # Between start and finish; a trainer that died may have left an update open.
        self._open: bool = any(report["open"] for report in self._reports())
        self._half = self._open

    def require_idle(self) -> None:
        """Raise where requests are under way; those that a half-updated model refused are dropped."""
        requests = self._client.unfinished()
        if requests and self._half:
            self._client.abort(requests)
        elif requests:
            raise WeightSyncError(
                f"{self.name} has {len(requests)} unfinished requests: their cache is of the old weights. "
                "Let them finish, or abort them, before a sync"
            )

    def begin(self, version: str) -> None:
        """From here on the engine refuses to generate."""
        if self._open:
            self._give_up(version)
        self._half = self._open = True
        self._call("start_weight_update", None)

    def take(self, version: str, index: int, chunk: Chunk, bucket: Bucket) -> list[tuple[int, Moved]]:
        """Have every worker load a chunk; what stands in each worker's model afterwards."""
        info = {
            "version": version,
            "index": index,
            "path": str(bucket.path),
            "nbytes": bucket.nbytes,
            "dtype": str(self.dtype).removeprefix("torch."),
            "chunk": chunk.to_dict(),
        }
        self._call("update_weights", {"update_info": info}, index)
        reports = self._require("taken", index)
        return [(report["rank"], _moved(fields)) for report in reports for fields in report["moved"]]

    def finish(self, version: str) -> None:
        """The engine generates again."""
        self._end()
        self._require("finished", -1)
        if not self._client.forget_cached(version):
            raise WeightSyncError(f"{self.name} did not empty its prefix cache: requests are under way")
        self._half = False

    def abandon(self, version: str) -> None:
        """End a failed update; the engine goes on refusing until one is complete."""
        if self._open and not (self._pending and self._pending.is_alive()):
            with contextlib.suppress(WeightSyncError):  # the error that led here is the one to tell
                self._give_up(version)

    def _give_up(self, version: str) -> None:
        # What came may be complete, and yet damaged: the workers cannot know.
        self._call("update_weights", {"update_info": {"version": version, "abandon": True}})
        self._end()

    def _end(self) -> None:
        self._call("finish_weight_update", None)
        self._open = False

    def close(self) -> None:
        """Forget the engine; it goes on with its weights."""
        self._remove_folder()

    def _require(self, state: str, index: int) -> list[dict[str, Any]]:
        """Every worker's report, where all are in this state."""
        reports = self._reports()
        others = [report for report in reports if (report["state"], report["index"]) != (state, index)]
        if others or len(reports) < self._workers:
            told = "; ".join(f"worker {r['rank']}: {r['error'] or 'is ' + r['state']}" for r in others)
            raise WeightSyncError(
                f"{self.name}: {told or 'a worker did not report'}", (), tuple(report["rank"] for report in others)
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
        if self._pending is not None:
            self._pending.join(self._timeout)  # vLLM answers in turn
            if self._pending.is_alive():
                raise self._error(method, index, time.monotonic() - started, "an earlier call has no answer yet")
        self._pending = thread = threading.Thread(target=run, name=f"polyshard-{method}", daemon=True)
        thread.start()
        while thread.is_alive() and time.monotonic() - started < self._timeout:
            thread.join(1.0)
            gone = [r for r in self._reports() if _process_state(r["pid"]) == "gone"]
            if thread.is_alive() and gone:
                thread.join(2.0)  # vLLM's own notice of it is on its way
                break
        if thread.is_alive():
            raise self._error(method, index, time.monotonic() - started, "no answer")
        if errors:
            raise self._error(method, index, time.monotonic() - started, _first_line(errors[0])) from errors[0]

    def _error(self, method: str, index: int, waited: float, seen: str) -> WeightSyncError:
        told, ranks = [], []
        for report in self._reports():
            state = _process_state(report["pid"])
            if report["state"] == "failed":
                told.append(f"worker {report['rank']}: {report['error']}")
            elif state == "gone":
                told.append(f"worker {report['rank']} (process {report['pid']}) is dead")
            elif state == "stopped":
                told.append(f"worker {report['rank']} (process {report['pid']}) is frozen")
            elif method == "update_weights" and report["index"] != index:
                told.append(f"worker {report['rank']} has not taken chunk {index}")
            else:
                continue
            ranks.append(report["rank"])
        about = "; ".join(told) or "all workers are alive"
        message = f"{self.name}: {method} failed after {waited:.1f} s: {about}; vLLM: {seen}"
        return WeightSyncError(message, (), tuple(ranks))

    def _reports(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self._folder.glob("worker-*.json"))]


def _moved(fields: dict[str, Any]) -> Moved:
    return Moved(fields["name"], tuple(fields["offsets"]), tuple(fields["sizes"]), fields["first"], fields["print"])


def _process_state(pid: int) -> str:
    """`running`, `stopped` or `gone`; a zombie is gone."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone" if Path("/proc/self").exists() else "running"
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(letter, "running")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
