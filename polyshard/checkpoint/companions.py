"""Companion files: the files of a model directory besides its weights and training state."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from pathlib import Path

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


def has_tokenizer(names: Iterable[str]) -> bool:
    """Return whether the files include a tokenizer of any kind."""
    return any(_matches(name, TOKENIZERS) for name in names)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
