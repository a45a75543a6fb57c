"""Readers of a model's weights that dequantize quantized tensors as they are read."""

from __future__ import annotations

import fnmatch
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from polyshard.checkpoint.files import TensorReader
from polyshard.checkpoint.quantization.dequantize import dequantized
from polyshard.checkpoint.quantization.detect import CONVERT, refuse_codes
from polyshard.core.errors import CheckpointError
from polyshard.core.weight_table import IGNORED_TENSORS
from polyshard.weights.lazy_tensor import LazyTensor

logger = logging.getLogger(__name__)

_UNSERVED = ("mxfp4", "bitsandbytes")


class DequantizedReader(TensorReader):
    """A reader of a quantized directory, with tensors in float32. A rank dequantizes only the regions that it reads.

    Args:
        reader: the reader of the files.
        tensors: the dequantized tensors, by name.
    """

    def __init__(self, reader: TensorReader, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = tensors
        stems = {name: name if name in reader.where else f"{name}_blocks" for name in tensors}
        self.where = {name: reader.where[stem] for name, stem in stems.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype as read."""
        return self._tensors[name].dtype

    def region(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a rectangle of a tensor and nothing else."""
        return self._tensors[name].part(offsets, sizes) if sizes else self.tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape as read."""
        return self._tensors[name].shape

    def tensor(self, name: str) -> torch.Tensor:
        """Read the full tensor."""
        return self._tensors[name].load()


def weights_reader(directory: Path, known: Collection[str], ignore: Sequence[str]) -> tuple[TensorReader, str | None]:
    """Return a reader of floating-point weights, and a note if it dequantizes them.

    Args:
        directory: a Hugging Face directory; config.json is optional.
        known: names of the model's own weights.
        ignore: shell patterns of tensors that the model may leave unused, whatever they contain.

    Raises:
        CheckpointError: files are missing or truncated, or the quantization is unsupported.
    """
    reader = TensorReader(directory)
    tensors, config = lazy_tensors(reader, ignore), stated_quantization(directory)
    plain = dequantized(tensors, config, directory, known=known)
    if not plain.notes:
        return reader, None
    left = {name: tensor for name, tensor in lazy_tensors(reader, ()).items() if name not in tensors}
    return DequantizedReader(reader, {**plain.tensors, **left}), "; ".join(plain.notes)


def refuse_quantized(
    directory: Path,
    reader: TensorReader,
    known: Collection[str],
    ignore: Sequence[str],
    taken: Collection[str] = (),
) -> None:
    """Check that the stored tensors are not quantized, regardless of the configuration.

    Args:
        directory: for the error.
        reader: of the files.
        known: names of the model's own weights, which are no scales whatever they are called.
        ignore: shell patterns of tensors that may be left over, whatever they hold.
        taken: names of tensors that layers load as codes and scales.

    Raises:
        CheckpointError: they are quantized.
    """
    tensors = {name: tensor for name, tensor in lazy_tensors(reader, ignore).items() if name not in taken}
    refuse_codes(tensors, None, directory, known=known)


def refuse_unserved_method(directory: Path) -> None:
    """Raise if config.json states a quantization that no layer of a served model takes.

    Raises:
        CheckpointError: it is MXFP4, whose codes are those of gpt-oss's experts, or bitsandbytes.
    """
    stated = stated_quantization(directory).get("quantization_config")
    method = stated.get("quant_method") if isinstance(stated, Mapping) else stated
    if method in _UNSERVED:
        raise CheckpointError(
            f"{directory} holds quantized weights that cannot be served: got quantization_config with "
            f"quant_method={method!r}, expected a method that vLLM applies to linear layers. {CONVERT}"
        )


def refuse_stored_codes(directory: Path) -> None:
    """Check that no safetensors file holds a matrix of integers or eight-bit floats under any name.

    Raises:
        CheckpointError: a file holds one, or a file is truncated.
    """
    if directory.is_dir() and next(directory.glob("*.safetensors"), None) is not None:
        reader = TensorReader(directory)
        refuse_quantized(directory, reader, reader.where, IGNORED_TENSORS)


def lazy_tensors(reader: TensorReader, ignore: Sequence[str]) -> dict[str, LazyTensor]:
    """Return the tensors of a directory, each read on demand.

    Args:
        reader: the reader of the files.
        ignore: shell patterns of names to leave out.
    """
    names = [name for name in reader.where if not any(fnmatch.fnmatch(name, pattern) for pattern in ignore)]
    return {
        name: LazyTensor(
            reader.shape(name), reader.dtype(name), partial(reader.tensor, name), partial(reader.region, name)
        )
        for name in names
    }


def stated_quantization(directory: Path) -> dict[str, Any]:
    """Return `quantization_config` of config.json as a field; empty if the file is missing or unreadable."""
    try:
        fields = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    stated = fields.get("quantization_config") if isinstance(fields, dict) else None
    return {"quantization_config": stated} if stated else {}
