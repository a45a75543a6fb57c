"""A model's weights as loading reads them: quantized tensors come as the floating-point ones that they stand for."""

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
from polyshard.core.dequantize import dequantized
from polyshard.core.errors import CheckpointError
from polyshard.core.foreign import LazyTensor
from polyshard.core.quantized import CONVERT, refuse_codes
from polyshard.core.weight_table import IGNORED_TENSORS

logger = logging.getLogger(__name__)

_UNSERVED = ("mxfp4", "bitsandbytes")


class DequantizedReader(TensorReader):
    """The tensors of a quantized directory in float32, read region by region: a rank dequantizes its own elements.

    Args:
        reader: of the files.
        tensors: what the names stand for.
    """

    def __init__(self, reader: TensorReader, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = tensors
        stems = {name: name if name in reader.where else f"{name}_blocks" for name in tensors}
        self.where = {name: reader.where[stem] for name, stem in stems.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as read."""
        return self._tensors[name].dtype

    def region(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """A rectangle of a tensor; nothing else is read."""
        return self._tensors[name].part(offsets, sizes) if sizes else self.tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as read."""
        return self._tensors[name].shape

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        return self._tensors[name].load()


def weights_reader(directory: Path, known: Collection[str], ignore: Sequence[str]) -> tuple[TensorReader, str | None]:
    """Return a reader of floating-point weights, and a note where it dequantizes them.

    Args:
        directory: a Hugging Face directory; it may have no config.json.
        known: names of the model's own weights.
        ignore: shell patterns of tensors that may be left over, whatever they hold.

    Raises:
        CheckpointError: files are missing or torn, or the weights are quantized by a rule that polyshard lacks.
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
    """Raise where stored tensors are codes; the configuration is not asked.

    Args:
        directory: for the error.
        reader: of the files.
        known: names of the model's own weights, which are no scales whatever they are called.
        ignore: shell patterns of tensors that may be left over, whatever they hold.
        taken: names of tensors that layers load as codes and scales.

    Raises:
        CheckpointError: they are.
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
    """Raise where safetensors files hold matrices of integers or eight-bit floats, whatever they are called.

    Raises:
        CheckpointError: they do, or the files are torn.
    """
    if directory.is_dir() and next(directory.glob("*.safetensors"), None) is not None:
        reader = TensorReader(directory)
        refuse_quantized(directory, reader, reader.where, IGNORED_TENSORS)


def lazy_tensors(reader: TensorReader, ignore: Sequence[str]) -> dict[str, LazyTensor]:
    """The tensors of a directory, each read when it is wanted.

    Args:
        reader: of the files.
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
    """What config.json says of quantization, as fields; empty where there is no such file or it cannot be read."""
    try:
        fields = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    stated = fields.get("quantization_config") if isinstance(fields, dict) else None
    return {"quantization_config": stated} if stated else {}
