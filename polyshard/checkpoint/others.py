"""Files in a checkpoint's directory that are not part of it: logs, other checkpoints, a tokenizer.

A save that replaces the directory keeps them. It refuses to, if they are weights: programs that read all weights of a
directory would read them together with the new ones.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from polyshard.checkpoint.manifest import MANIFEST, read_manifest
from polyshard.core.errors import CheckpointError

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


def listed_files(directory: Path) -> set[str]:
    """Return the files of the checkpoint in a directory, its manifest included; none if it holds no checkpoint."""
    try:
        manifest = read_manifest(directory)
    except CheckpointError:  # damaged, or of a newer version
        manifest = None
    return set() if manifest is None else {MANIFEST, *manifest.files}


def refuse_other_weights(directory: Path, others: Iterable[str]) -> None:
    """Check that no program would read another file of the directory as weights of the checkpoint.

    Args:
        directory: of the checkpoint.
        others: relative paths of files that are not part of the old or the new checkpoint.

    Raises:
        CheckpointError: there is one.
    """
    weights = sorted(name for name in others if "/" not in name and name.endswith(_WEIGHTS))
    if weights:
        raise CheckpointError(
            f"{directory} holds weights that are not part of a checkpoint of polyshard: {', '.join(weights[:5])}"
            f"{', ...' if len(weights) > 5 else ''}. Nothing was changed: remove them, or name another directory."
        )


def other_files(directory: Path, new: Collection[str]) -> list[str]:
    """Return relative paths of the files of a local directory that are neither in its checkpoint nor in `new`."""
    part = listed_files(directory).union(new)
    return sorted(name for name in local_files(directory) if name not in part)


def local_files(directory: Path) -> set[str]:
    """Return relative paths of all files below a local directory; links are not followed."""
    return {
        (Path(folder) / name).relative_to(directory).as_posix()
        for folder, folders, names in os.walk(directory)
        for name in (*names, *(each for each in folders if (Path(folder) / each).is_symlink()))
    }


def keep(others: Iterable[str], old: Path, new: Path) -> None:
    """Make other files of the old directory appear in the new one: by a link if the file system has them."""
    for name in others:
        source, target = old / name, new / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target, follow_symlinks=False)
        except FileNotFoundError:  # removed in the meantime
            continue
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)
