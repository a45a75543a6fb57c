"""What a reader of another program's checkpoints gives: logical tensors under Hugging Face names, one at a time."""

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

Shape = DecoderSpec  # its name before it knew more than sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """A checkpoint as logical tensors.

    Attributes:
        tensors: by Hugging Face name.
        config: fields of config.json, where they are known.
        companions: a directory with the files that belong to the model beside its weights, where there is one.
        tokenizer: writes the tokenizer that the source holds in a form of its own into a directory; gives notes.
        notes: what was left out or changed, for the user.
    """

    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any] | None = None
    companions: Path | None = None
    tokenizer: Callable[[Path], tuple[str, ...]] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Independent:
    """A checkpoint as a reader other than `CheckpointFormat.read` understands it, for `--verify`.

    Attributes:
        by: that reader, in words.
        state: tensors under Hugging Face names, which transformers computes logits from.
        logits: or what computes them itself, in float32 or more: token ids `[1, tokens]` to `[tokens, vocabulary]`;
            weights are first rounded to the dtype, where one is given.
        directory: or a Hugging Face directory, which transformers loads; with `gguf` the name of a GGUF file in it.
        gguf: see `directory`.
    """

    by: str
    state: Mapping[str, torch.Tensor] | None = None
    logits: Callable[[torch.Tensor, torch.dtype | None], torch.Tensor] | None = None
    directory: Path | None = None
    gguf: str | None = None


class NotComparableError(Exception):
    """No independent reader can compute what `--verify` asks for; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user says about a conversion.

    Attributes:
        config: fields of config.json, for formats that hold none.
        allow_pickle: files that are pickles may be read. Tensors are read with `weights_only=True`, and other types
            as inert objects; DeepSpeed's own code, which joins ZeRO's files, can run code.
        tensor_parallel: ranks to write for, in formats with a file for each.
        padded_vocabulary: multiple that the vocabulary is padded to, in formats that pad.
    """

    config: Mapping[str, Any] | None = None
    allow_pickle: bool = False
    tensor_parallel: int = 1
    padded_vocabulary: int = 1

    def need_config(self, name: str, *places: Path) -> Mapping[str, Any]:
        """The configuration: the user's, or a config.json that stands beside the checkpoint.

        Args:
            name: the format's, for the error.
            places: directories that may hold one.

        Raises:
            CheckpointError: there is none, or the two describe different models.
        """
        beside = next((place / "config.json" for place in places if (place / "config.json").is_file()), None)
        stored = None if beside is None else config_fields_of(beside)
        if self.config is None and stored is None:
            raise CheckpointError(
                f"{name} checkpoints do not hold the model's configuration: pass --config DIRECTORY, a Hugging Face "
                "directory (or its config.json) of the same architecture"
            )
        if self.config is not None and stored is not None:
            differences = DecoderSpec.of(self.config).differences(DecoderSpec.of(stored))
            if differences:
                raise CheckpointError(
                    f"--config describes another model than {beside}: got {'; '.join(differences)}, expected equal "
                    "fields. Leave --config out, or remove the file if it is wrong."
                )
        return self.config if self.config is not None else stored or {}

    def need_pickle(self, path: Path) -> None:
        """Raise where a pickle would have to be read and the user has not allowed it."""
        if not self.allow_pickle:
            raise CheckpointError(
                f"{path} is a pickle, which can run code when it is read: pass --allow-pickle if you trust its origin"
            )


class CheckpointFormat(Protocol):
    """One way in which checkpoints stand on disk."""

    name: str
    writes: bool

    def detect(self, path: Path) -> str | None:
        """What stands at `path`, in words; None where it is of another format. Nothing is unpickled."""
        ...

    def read(self, path: Path, options: Options) -> Foreign:
        """The checkpoint as logical tensors.

        Raises:
            CheckpointError: it is torn, cannot be understood, needs what the options do not give, or holds a tensor
                or a field that the result would not carry.
        """
        ...

    def write(self, foreign: Foreign, path: Path, options: Options) -> tuple[str, ...]:
        """Write logical tensors in this format, into an empty directory; gives notes.

        Raises:
            CheckpointError: the format has no place for a tensor or for a field of the configuration.
        """
        ...

    def independent(self, path: Path, options: Options) -> Independent:
        """The checkpoint by another reader than `read`.

        Raises:
            NotComparableError: there is none.
        """
        ...


def config_fields_of(path: Path) -> dict[str, Any]:
    """config.json's fields, of a directory or a file.

    Raises:
        CheckpointError: it is missing or is no JSON object.
        ConfigFileError: a field is missing or wrong.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is no readable config.json: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} holds a {type(fields).__name__}, expected a JSON object")
    check_fields(fields, file)
    check_complete(fields, file)
    return fields


def lazy(tensor: torch.Tensor) -> LazyTensor:
    """A tensor that is there already."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)
