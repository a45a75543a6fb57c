"""Forwarding of errors from a server's worker processes to the process that started the server.

A vLLM engine that runs in child processes reports a failed start as "initialization failed, see above", and only the
worker's log shows the reason. Each worker writes its error to a file, and the parent process raises it.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from polyshard.core.environment import FAILURES
from polyshard.core.errors import (
    AdapterError,
    CheckpointError,
    ConfigurationError,
    LayoutError,
    MissingDependencyError,
    PolyshardError,
    RegistrationError,
)

_RAISED = (RegistrationError, CheckpointError, LayoutError, ConfigurationError, AdapterError, MissingDependencyError)
_DIRECTORY = FAILURES.name  # inherited by workers


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """Raise the error of a vLLM engine's worker process in place of the engine's own "see above".

    Use it around the code that starts the engine: `with polyshard.engine_errors(): llm = LLM(...)`.

    Raises:
        PolyshardError: the class that the first failing worker raised (`RegistrationError` for an error that is not
            polyshard's), with the worker's rank, message and traceback. The engine's own exception is its cause. An
            exception without a worker's report is re-raised unchanged.

    Examples:
        >>> with engine_errors():
        ...     pass  # llm = vllm.LLM(...)
    """
    before = os.environ.get(_DIRECTORY)
    with tempfile.TemporaryDirectory(prefix="polyshard-failures-") as directory:
        os.environ[_DIRECTORY] = directory
        try:
            yield
        except PolyshardError:  # the engine runs in this process
            raise
        except Exception as error:
            reports = sorted(Path(directory).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
            if not reports:
                raise
            raise _explained([json.loads(path.read_text()) for path in reports]) from error
        finally:
            if before is None:
                del os.environ[_DIRECTORY]
            else:
                os.environ[_DIRECTORY] = before


@contextlib.contextmanager
def report_to_parent(rank: int) -> Iterator[None]:
    """Write this worker's exception to the file that `engine_errors` reads.

    Examples:
        >>> with engine_errors(), report_to_parent(rank=1):
        ...     raise RegistrationError("no such factory")
        Traceback (most recent call last):
        polyshard.core.errors.RegistrationError: no such factory
    """
    try:
        yield
    except Exception as error:
        directory = os.environ.get(_DIRECTORY)
        if directory is not None:
            report = {
                "rank": rank,
                "type": type(error).__name__,
                "message": str(error),
                "traceback": "".join(traceback.format_exception(error)),
            }
            with contextlib.suppress(OSError):  # the parent may be gone; the error itself is re-raised
                part = Path(directory) / f"{rank}.part"
                part.write_text(json.dumps(report))
                part.rename(part.with_suffix(".json"))
        raise


def _explained(reports: list[dict[str, str]]) -> PolyshardError:
    first = reports[0]
    kind = {kind.__name__: kind for kind in _RAISED}.get(first["type"])
    message = first["message"] if kind is not None else f"{first['type']}: {first['message']}"
    same = [report["rank"] for report in reports if report["message"] == first["message"]]
    ranks = f"rank {first['rank']}" if len(same) == 1 else f"ranks {', '.join(map(str, sorted(same)))}"
    found = (kind or RegistrationError)(f"{ranks} of the engine: {message}")
    found.add_note(f"In the worker:\n{first['traceback']}")
    return found
