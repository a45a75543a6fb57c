"""Every format that is known: Hugging Face's, GGUF, and those in the rooms of the libraries' adapters."""

from __future__ import annotations

from pathlib import Path

from polyshard.convert.format import CheckpointFormat
from polyshard.convert.gguf import GgufFormat
from polyshard.convert.huggingface import HuggingFaceBinFormat, HuggingFaceFormat
from polyshard.core.discovery import adapter_names, load_adapter
from polyshard.core.errors import CheckpointError


def formats() -> list[CheckpointFormat]:
    """All of them, in the order in which they are asked. No library is imported for it."""
    found: list[CheckpointFormat] = [HuggingFaceFormat(), HuggingFaceBinFormat(), GgufFormat()]
    for name in adapter_names():
        found += getattr(load_adapter(name), "formats", ())
    return found


def format_named(name: str) -> CheckpointFormat:
    """The format of a name.

    Raises:
        CheckpointError: there is none.
    """
    known = {entry.name: entry for entry in formats()}
    if name not in known:
        raise CheckpointError(f"unknown format {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def detect(path: Path) -> tuple[CheckpointFormat, str]:
    """The format of what stands at `path`, and what it is in words.

    Raises:
        CheckpointError: nothing is there, or it is of no known format, or of several.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    found = [(entry, told) for entry in formats() if (told := entry.detect(path)) is not None]
    if not found:
        held = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else [path.name]
        raise CheckpointError(
            f"{path} is of no known format; it holds {held}. Known: {', '.join(entry.name for entry in formats())}"
        )
    if len(found) > 1:
        names = ", ".join(f"{entry.name} ({told})" for entry, told in found)
        raise CheckpointError(f"{path} could be {names}: say which with --from")
    return found[0]
