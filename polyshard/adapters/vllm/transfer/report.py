"""The result of a sync."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """The result of one sync, as this rank saw it.

    Attributes:
        version: version of the weights.
        tensors: number of stored tensors.
        nbytes: size of the full model in bytes, in the engine's dtype.
        shared_bytes: size of the trainer's memory that this process's engines share, or pack directly from.
        seconds: wall time.

    Examples:
        >>> report = SyncReport(version="1", tensors=2, nbytes=4_000_000, shared_bytes=1_000_000, seconds=0.5)
        >>> f"{report.nbytes / report.seconds / 1e6:.0f} MB/s, {report.shared_bytes / report.nbytes:.0%} shared"
        '8 MB/s, 25% shared'
    """

    version: str
    tensors: int
    nbytes: int
    shared_bytes: int
    seconds: float
