"""The protocol of checkpoint formats: reading and writing logical tensors under Hugging Face names, one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from polyshard.config.decoder_spec import DecoderSpec
from polyshard.config.file import check_complete, check_fields
from polyshard.core.errors import CheckpointError
from polyshard.weights.lazy_tensor import LazyTensor

Shape = DecoderSpec  # the former name of the class


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """A checkpoint as logical tensors.

    Attributes:
        tensors: the tensors, by Hugging Face name.
        config: fields of config.json, if known.
        companions: a directory with companion files, if there is one.
        tokenizer: writes a tokenizer that the source holds in its own format into a directory, and returns notes.
        notes: what was left out or changed, for the user.
    """

    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any] | None = None
    companions: Path | None = None
    tokenizer: Callable[[Path], tuple[str, ...]] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Independent:
    """A checkpoint as understood by a reader other than `CheckpointFormat.read`, for `--verify`.

    One of `state`, `logits` and `directory` is set.

    Attributes:
        by: description of the reader.
        state: tensors under Hugging Face names, from which transformers computes logits.
        logits: a function from token IDs `[1, tokens]` to logits `[tokens, vocabulary]` in float32 or wider. If a dtype
            is given, weights are rounded to it first.
        directory: a Hugging Face directory that transformers loads.
        gguf: name of a GGUF file in `directory`, to load instead of safetensors.
    """

    by: str
    state: Mapping[str, torch.Tensor] | None = None
    logits: Callable[[torch.Tensor, torch.dtype | None], torch.Tensor] | None = None
    directory: Path | None = None
    gguf: str | None = None


class NotComparableError(Exception):
    """No independent reader can compute what `--verify` needs; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The user's settings for a conversion.

    Attributes:
        config: fields of config.json, for formats without a configuration.
        allow_pickle: whether pickle files may be read. Tensors are read with `weights_only=True`, and objects of other
            types as inert stand-ins; but DeepSpeed's own code, which joins ZeRO files, can run code.
        tensor_parallel: number of ranks to write for, in formats with one file for each.
        padded_vocabulary: multiple to which the vocabulary is padded, in formats that pad.

    Examples:
        >>> Options(config={"model_type": "llama"}, tensor_parallel=2).tensor_parallel
        2
    """

    config: Mapping[str, Any] | None = None
    allow_pickle: bool = False
    tensor_parallel: int = 1
    padded_vocabulary: int = 1

    def need_config(self, name: str, *places: Path) -> Mapping[str, Any]:
        """Return the configuration: the user's, or that of a config.json beside the checkpoint.

        Args:
            name: name of the format, for the error.
            places: directories that may contain a config.json.

        Raises:
            CheckpointError: there is no configuration, or the two describe different models.
        """
        beside = next((place / "config.json" for place in places if (place / "config.json").is_file()), None)
        stored = None if beside is None else config_fields_of(beside)
        if self.config is None and stored is None:
            raise CheckpointError(
                f"{name} checkpoints do not hold the model's configuration. Pass --config DIRECTORY, a Hugging Face "
                "directory (or its config.json) of the same architecture."
            )
        if self.config is not None and stored is not None:
            ours, theirs = (DecoderSpec.of(fields, experts=True) for fields in (self.config, stored))
            differences = ours.differences(theirs)
            if differences:
                raise CheckpointError(
                    f"--config describes another model than {beside}: got {'; '.join(differences)}, expected equal "
                    "fields. Omit --config, or remove the file if it is wrong."
                )
        return self.config if self.config is not None else stored or {}

    def need_pickle(self, path: Path) -> None:
        """Raise `CheckpointError` if a pickle must be read and the user has not allowed it."""
        if not self.allow_pickle:
            raise CheckpointError(
                f"{path} is a pickle, which can run code when it is read. Pass --allow-pickle if you trust its origin."
            )


class CheckpointFormat(Protocol):
    """A format of checkpoints on disk."""

    name: str
    writes: bool

    def detect(self, path: Path) -> str | None:
        """Describe the checkpoint at `path`, or return None if it has another format. Nothing is unpickled."""
        ...

    def read(self, path: Path, options: Options) -> Foreign:
        """Read the checkpoint as logical tensors.

        Raises:
            CheckpointError: the checkpoint is truncated or malformed, needs an option that is not set, or holds a
                tensor or field that the result would lose.
        """
        ...

    def write(self, foreign: Foreign, path: Path, options: Options) -> tuple[str, ...]:
        """Write logical tensors in this format into an empty directory, and return notes.

        Raises:
            CheckpointError: the format cannot store a tensor or a field of the configuration.
        """
        ...

    def independent(self, path: Path, options: Options) -> Independent:
        """Return the checkpoint as understood by another reader than `read`.

        Raises:
            NotComparableError: there is no such reader.
        """
        ...


def config_fields_of(path: Path) -> dict[str, Any]:
    """Return the fields of config.json from a directory or a file.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
        ConfigFileError: a field is missing or invalid.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not a readable config.json: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} is invalid: got a {type(fields).__name__}, expected a JSON object")
    check_fields(fields, file)
    check_complete(fields, file)
    return fields


def lazy(tensor: torch.Tensor) -> LazyTensor:
    """Wrap a tensor that is already in memory.

    Examples:
        >>> lazy(torch.ones(2, 3)).shape
        (2, 3)
    """
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)
