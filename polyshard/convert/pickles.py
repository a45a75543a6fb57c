"""Safe reading of pickles of tensors and plain data.

Training checkpoints also hold random states of numpy and Python, enums and parsed arguments. Such types are never
imported: an inert stand-in takes the place of each object and only stores its data.
"""

from __future__ import annotations

import argparse
import collections
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from polyshard.convert.format import Options
from polyshard.core.errors import CheckpointError

# Packages whose types a training checkpoint may name. All other types are rejected by name.
INERT_PACKAGES = (
    *("numpy", "enum", "pathlib", "signal", "types", "random", "datetime", "decimal", "io", "_io", "copyreg"),
    *("torch", "megatron", "deepspeed", "transformer_engine", "apex", "nemo", "omegaconf", "pytorch_lightning"),
)
_UNKNOWN = re.compile(r"GLOBAL ([\w.]+)")
INERT_BUILTINS = ("set", "frozenset", "complex", "slice", "range", "bytearray", "object")


class Inert:
    """A stand-in for an object whose type was not imported."""

    name = "?"

    def __new__(cls, *arguments: Any) -> Inert:
        """Store the arguments without running anything."""
        made = super().__new__(cls)
        made.__dict__["arguments"] = arguments
        return made

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inert) and (self.name, self.__dict__) == (other.name, other.__dict__)

    def __repr__(self) -> str:
        return f"<{self.name} {', '.join(map(repr, self.__dict__['arguments']))}>"


def load_pickle(path: Path, options: Options) -> Any:
    """Load a `torch.save` file of tensors, plain data and inert objects. The file is mapped into memory.

    Args:
        path: the file.
        options: must allow pickles.

    Returns:
        The content; an object of a package in `INERT_PACKAGES` is an `Inert`.

    Raises:
        CheckpointError: the file is truncated or names a type that is not allowed, or pickles are not allowed.

    Examples:
        >>> torch.save({"a": torch.ones(2)}, "weights.pt")
        >>> load_pickle(Path("weights.pt"), Options(allow_pickle=True))
        {'a': tensor([1., 1.])}
    """
    options.need_pickle(path)
    with _no_types_of_others():
        return _load(path)


@contextmanager
def _no_types_of_others() -> Iterator[None]:
    """Clear torch's process-wide list of safe types, to which libraries add on import, and restore it afterwards."""
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(added)


def _load(path: Path) -> Any:
    try:
        found = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:
        found = set()  # truncated, or written by torch before 1.6: loading raises the error
    while True:
        refused = sorted(name for name in found if not _may_stand_in(name))
        if refused:
            raise CheckpointError(
                f"{path} cannot be read as tensors and plain data: it names {', '.join(refused[:5])}, which polyshard "
                "does not load because reading it can run code. Save only the weights, in the program that wrote "
                "the file: torch.save({'model': torch.load(FILE, weights_only=False)['model']}, FILE), with 'module' "
                "for 'model' in DeepSpeed's files."
            )
        stand_ins: list[Any] = [(_stand_in(name), name) for name in found]
        try:
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except Exception as error:
            named = _UNKNOWN.search(str(error))
            name = "" if named is None else named[1] if "." in named[1] else f"builtins.{named[1]}"
            if not name or name in found:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
                raise CheckpointError(
                    f"{path} cannot be read as tensors and plain data: {type(error).__name__}: {lines[0][:300]}. Copy "
                    "it again if it may be truncated; otherwise save only the weights, in the program that wrote it."
                ) from None
            found.add(name)


def _may_stand_in(name: str) -> bool:
    package, _, rest = name.partition(".")
    if package in ("builtins", "__builtin__"):
        return rest in INERT_BUILTINS
    return name in ("argparse.Namespace", "collections.deque") or package in INERT_PACKAGES


def _stand_in(name: str) -> Any:
    if name == "argparse.Namespace":
        return argparse.Namespace  # attributes only
    if name == "collections.deque":
        return collections.deque
    return type("Inert", (Inert,), {"name": name})


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"PK"
