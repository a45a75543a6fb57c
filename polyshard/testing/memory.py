"""Measurement of peak memory."""

from __future__ import annotations

import threading
from pathlib import Path


class PeakMemory:
    """A context manager that samples the memory of this process (anonymous and shared; mapped files are not counted).

    Attributes:
        bytes: the peak above the level at the start; set at the end of the block.
    """

    def __init__(self, interval: float = 0.001) -> None:
        self._interval = interval
        self._stop = threading.Event()
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        self._start = _resident()
        self._peak = self._start
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self._peak, _resident()) - self._start

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._peak = max(self._peak, _resident())


def _resident() -> int:
    """Return the resident memory in bytes, from Linux's /proc."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
