"""The folder for the temporary files of an engine, which is removed with the engine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SOCKET_PATH = 107  # bytes, on Linux
_SOCKET_NAME = 1 + 36  # vLLM names its sockets by UUIDs


def engine_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder whose path is short enough for an engine's sockets."""
    folder = tempfile.TemporaryDirectory(prefix="polyshard-engine-", ignore_cleanup_errors=True)
    if len(os.fsencode(folder.name)) + _SOCKET_NAME <= _SOCKET_PATH:
        return folder
    folder.cleanup()
    return tempfile.TemporaryDirectory(prefix="polyshard-engine-", dir="/tmp", ignore_cleanup_errors=True)


@contextmanager
def temporary_files_in(folder: str | Path) -> Iterator[None]:
    """Make this process, and children that it starts, create their temporary files in `folder`.

    vLLM does not remove its sockets and rendezvous files.
    """
    before, variable = tempfile.tempdir, os.environ.get("TMPDIR")
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        if variable is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = variable
