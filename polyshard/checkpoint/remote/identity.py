"""What a file system tells about a file's content, from which it is seen that another program has replaced it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyshard.checkpoint.location import file_system, key

Identity = Mapping[str, str]

# Of S3, of Google Cloud Storage and Azure, and of file systems that only know when a file was written.
_FIELDS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "mtime", "created", "modified")


def identity(path: Path) -> Identity:
    """Return the fields by which a file system tells one content of a remote file from another; may be empty."""
    info: Mapping[str, Any] = file_system(path).info(key(path))
    return {name: str(info[name]) for name in _FIELDS if info.get(name) is not None}


def is_replaced(path: Path, written: Identity) -> bool:
    """Return whether a remote file is missing, or has another content than it had when `identity` was called."""
    try:
        now = identity(path)
    except FileNotFoundError:
        return True
    return any(now[name] != value for name, value in written.items() if name in now)
