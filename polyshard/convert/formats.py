"""All known checkpoint formats: Hugging Face, GGUF, and those of the libraries' adapters."""

from __future__ import annotations

from pathlib import Path

from polyshard.convert.format import CheckpointFormat
from polyshard.convert.gguf import GgufFormat
from polyshard.convert.huggingface import HuggingFaceBinFormat, HuggingFaceFormat
from polyshard.core.discovery import adapter_names, load_adapter
from polyshard.core.errors import CheckpointError


def formats() -> list[CheckpointFormat]:
    """Return all formats, in the order in which they are tried. No library is imported.

    Examples:
        >>> [entry.name for entry in formats()][:3]
        ['huggingface', 'huggingface-bin', 'gguf']
    """
    found: list[CheckpointFormat] = [HuggingFaceFormat(), HuggingFaceBinFormat(), GgufFormat()]
    for name in adapter_names():
        found += getattr(load_adapter(name), "formats", ())
    return found


def format_named(name: str) -> CheckpointFormat:
    """Return the format of a name.

    Raises:
        CheckpointError: there is no such format.

    Examples:
        >>> format_named("gguf").writes
        False
    """
    known = {entry.name: entry for entry in formats()}
    if name not in known:
        raise CheckpointError(f"unknown format {name!r}, expected one of {', '.join(sorted(known))}")
    return known[name]


def detect(path: Path) -> tuple[CheckpointFormat, str]:
    """Return the format of the checkpoint at `path`, and a description of it.

    Raises:
        CheckpointError: the path does not exist, or the checkpoint is of an unknown format or of several.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    found = [(entry, description) for entry in formats() if (description := entry.detect(path)) is not None]
    if not found:
        held = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else [path.name]
        raise CheckpointError(
            f"{path} has an unknown format: got {held}, expected one of {', '.join(entry.name for entry in formats())}"
        )
    if len(found) > 1:
        names = ", ".join(f"{entry.name} ({description})" for entry, description in found)
        raise CheckpointError(f"{path} is ambiguous: it could be {names}. Pass --from.")
    return found[0]
