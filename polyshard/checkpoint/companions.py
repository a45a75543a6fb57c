"""Companion files: the files of a model directory besides its weights and training state."""

from __future__ import annotations

import fnmatch
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from polyshard.checkpoint.directory import find
from polyshard.checkpoint.location import file_system, is_remote, key
from polyshard.core.errors import CheckpointError

logger = logging.getLogger(__name__)

# Written by the conversion itself, or specific to one format.
REPLACED = (
    *("config.json", "params.json", "metadata.json", "polyshard.json", "*.index.json", "latest", "latest_universal"),
    *("latest_checkpointed_iteration.txt", "zero_to_fp32.py", "checklist.chk", ".*"),
)
WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.distcp", "*.h5", "*.msgpack", "*.onnx", "*.ckpt"),
    *("*.npz", "*.pkl", "*.pickle", "*.tflite", "*.mlmodel"),
)
TRAINING_STATE = ("trainer_state.json", "events.out.tfevents*", "*.log", "wandb")
FOLDERS = ("*chat_templates*",)
# Files that hold a tokenizer, by the names that transformers and vLLM know.
TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "*tiktoken*", "*.model", "*.spm", "tekken*.json", "sentencepiece*")


def companions(directory: Path, *, is_model: bool) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Return the companion files to copy, keyed by relative path, and notes on files that are left out.

    Args:
        directory: the source directory.
        is_model: whether the directory is a model's, as on the Hugging Face Hub, and not a training run's. All
            folders of a model's directory are then copied, or named in the notes.

    Examples:
        >>> _ = Path("tokenizer.json").write_text("{}")
        >>> _ = Path("model.safetensors").write_bytes(b"")
        >>> companions(Path("."), is_model=True)
        ({'tokenizer.json': PosixPath('tokenizer.json')}, ())
    """
    found: dict[str, Path] = {}
    left: list[str] = []
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        if _matches(entry.name, REPLACED):
            continue
        if entry.is_dir():
            if not is_model and not _matches(entry.name, FOLDERS):
                continue  # a training run's own parts, logs and data
            inside = [file for file in sorted(entry.rglob("*")) if file.is_file()]
            if inside and not any(_matches(file.name, (*WEIGHTS, ".metadata")) for file in inside):
                found |= {str(file.relative_to(directory)): file for file in inside}
            elif inside:
                left.append(f"{entry.name}/")
        elif _matches(entry.name, TRAINING_STATE):
            left.append(entry.name)
        elif not _matches(entry.name, WEIGHTS):
            found[entry.name] = entry
    notes = (f"left out: {', '.join(left)}",) if left else ()
    return found, notes


def copy_companions(source: Path, target: Path) -> dict[str, Path]:
    """Copy the companion files of a model to a local directory; return the copies, keyed by relative path.

    Files that are left out are logged.

    Args:
        source: a directory, local or remote (see `as_path`), of which only these files are read.
        target: an existing local directory.

    Raises:
        CheckpointError: the source is no directory, or a file cannot be copied.
    """
    copies: dict[str, Path] = {}
    try:
        directory = find(source)
        if not directory.is_dir():
            raise CheckpointError(
                f"companions is invalid: got {source}, expected a directory. Pass one with the model's tokenizer, or "
                "leave it out."
            )
        found, left = companions(directory, is_model=False)
        for name, file in found.items():
            copies[name] = target / name
            copies[name].parent.mkdir(parents=True, exist_ok=True)
            if is_remote(file):
                file_system(file).get_file(key(file), str(copies[name]))
            else:
                shutil.copyfile(file, copies[name])
    except CheckpointError:
        raise
    except Exception as error:  # clients of remote file systems have errors of their own
        raise CheckpointError(f"companion files of {source} cannot be copied: {error}") from error
    for note in left:
        logger.info("%s: %s", source, note)
    return copies


def has_tokenizer(names: Iterable[str]) -> bool:
    """Return whether the files include a tokenizer of any kind."""
    return any(_matches(name, TOKENIZERS) for name in names)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
