"""From any format that can be read to any that can be written, with proof."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from polyshard.checkpoint.companions import companions, has_tokenizer
from polyshard.checkpoint.directory import publish
from polyshard.checkpoint.model_code import check_code
from polyshard.checkpoint.quantization.dequantize import dequantized
from polyshard.checkpoint.quantization.detect import FLOATS, refuse_codes
from polyshard.checkpoint.stream import write_tensors
from polyshard.config.decoder_spec import FAMILIES
from polyshard.convert.accounting import some
from polyshard.convert.casting import cast
from polyshard.convert.format import CheckpointFormat, Foreign, Options
from polyshard.convert.formats import detect, format_named
from polyshard.convert.huggingface import HuggingFaceFormat
from polyshard.convert.model_check import check_model, narrowed, with_embedding
from polyshard.convert.verification import Proof, Side, prove
from polyshard.core.errors import CheckpointError
from polyshard.weights.lazy_tensor import LazyTensor

_ADVICE = (
    "Pass --dtype to dequantize FP8, compressed-tensors' int8 and float8, and MXFP4; dequantize others with the "
    "library that wrote them. Between Hugging Face directories all are copied as they are without --dtype."
)
_CODE_ADVICE = "Copy it into the source, or take auto_map out of the configuration."

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was done.

    Attributes:
        found: the source, in words.
        source: its format.
        target: the format written.
        tensors: how many.
        nbytes: of the tensors, as read.
        notes: what was left out or changed.
        verified: how many tensors were read back and compared; None where that was not asked for.
        logits: the largest difference of logits, where it could be computed.
        compared: what `verify` compared, in words.
        not_compared: what it could not compare, and why.
    """

    found: str
    source: str
    target: str
    tensors: int
    nbytes: int
    notes: tuple[str, ...]
    verified: int | None = None
    logits: float | None = None
    compared: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()


def convert(
    source: Path,
    target: Path,
    *,
    from_format: str | None = None,
    to_format: str = "huggingface",
    options: Options | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint: every tensor is carried, or the conversion fails and lists what it would drop.

    Args:
        source: file or directory.
        target: a directory that does not exist yet; it is there whole afterwards, or not at all.
        from_format: by name; default what is detected.
        to_format: by name.
        options: see `Options`.
        dtype: of the tensors written; default as they are.
        verify: read the target back and compare every tensor's fingerprint; and compare the logits of source and target
            by readers that took no part in the conversion.
        progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: the source cannot be read, holds what the target would not, the target exists or cannot be
            written, a value does not fit the dtype, or the proof fails. Nothing is left behind.
    """
    options = options or Options()
    if dtype is not None and dtype not in FLOATS:
        raise CheckpointError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
    reader, found = detect(source) if from_format is None else (format_named(from_format), from_format)
    writer = format_named(to_format)
    if not writer.writes:
        writer.write(Foreign(tensors={}), target, options)  # says what to write instead
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target} exists and is not empty: name a new directory")
    foreign = reader.read(source, options)
    copies = isinstance(writer, HuggingFaceFormat)
    if not (copies and reader.name.startswith("huggingface") and dtype is None):
        foreign = _without_codes(foreign, source, dtype)
    foreign = with_embedding(foreign)
    notes = [*foreign.notes, *check_model(foreign, source, given=options.config is not None)]
    if not copies:
        foreign, dropped = narrowed(foreign, source)
        notes += dropped
    foreign = replace(foreign, config=_completed(foreign, dtype))
    written, casts = (foreign, None) if dtype is None else cast(foreign, dtype)
    staging = target.parent / f".{target.name}.converting-{os.getpid()}-{secrets.token_hex(4)}"
    place = staging / "target"
    target.parent.mkdir(parents=True, exist_ok=True)
    staging.mkdir()
    proof: Proof | None = None
    try:
        notes += _write(written, writer, place, options, reader.name, progress)
        notes += casts.notes() if casts is not None else ()
        if verify:
            ours = Side(format=reader, path=source, options=replace(options, allow_pickle=True, config=foreign.config))
            theirs = Side(format=writer, path=place, options=Options(allow_pickle=True))  # written a moment ago
            proof = prove(written, ours, theirs, rounded=dtype)
        publish(place, target)
    except OSError as error:
        raise CheckpointError(f"writing {target} failed, and nothing was changed: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Conversion(
        found=found,
        source=reader.name,
        target=writer.name,
        tensors=len(foreign.tensors),
        nbytes=sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in foreign.tensors.values()),
        notes=tuple(notes),
        verified=None if proof is None else proof.tensors,
        logits=None if proof is None else proof.logits,
        compared=() if proof is None else proof.compared,
        not_compared=() if proof is None else proof.not_compared,
    )


def _without_codes(foreign: Foreign, source: Path, dtype: torch.dtype | None) -> Foreign:
    if dtype is None:
        refuse_codes(foreign.tensors, foreign.config, source, _ADVICE)
        return foreign
    plain = dequantized(foreign.tensors, foreign.config, source, advice=_ADVICE)
    return replace(foreign, tensors=plain.tensors, config=plain.config, notes=(*foreign.notes, *plain.notes))


def _completed(foreign: Foreign, dtype: torch.dtype | None) -> Mapping[str, Any] | None:
    """The configuration with the dtype asked for, and with the class that servers look for where the family has one."""
    if foreign.config is None:
        return None
    fields = dict(foreign.config)
    if dtype is not None:
        fields.pop("torch_dtype", None)
        fields["dtype"] = str(dtype).removeprefix("torch.")
    if not fields.get("architectures") and fields.get("model_type") in FAMILIES:
        fields["architectures"] = [f"{fields['model_type'].capitalize()}ForCausalLM"]
    return fields


def _write(
    foreign: Foreign, writer: CheckpointFormat, place: Path, options: Options, source: str, progress: Progress | None
) -> list[str]:
    """Write weights, configuration and companions; gives notes.

    Raises:
        CheckpointError: the writer passed over a tensor, besides what it says itself.
    """
    if foreign.config is None:
        options.need_config(source)
    assert foreign.config is not None
    watched, loaded = _watched(foreign)
    notes: list[str] = []
    beside, whole = foreign.companions, source.startswith("huggingface")
    files, left = companions(beside, is_model=whole) if beside is not None else ({}, ())
    notes += left
    with tempfile.TemporaryDirectory(prefix="polyshard-tokenizer-") as folder:
        if foreign.tokenizer is not None:
            notes += foreign.tokenizer(Path(folder))
            files |= {file.name: file for file in Path(folder).iterdir()}
        if not has_tokenizer(files):
            notes.append("the source holds no tokenizer that could come along: copy the model's own beside the weights")
        check_code(foreign.config, files, _CODE_ADVICE)
        if isinstance(writer, HuggingFaceFormat):
            listed = [(name, tensor.shape, tensor.dtype, tensor.load) for name, tensor in watched.tensors.items()]
            write_tensors(place, listed, foreign.config, companions=files, progress=progress)
        else:
            place.mkdir()
            notes += writer.write(watched, place, options)
            (place / "config.json").write_text(json.dumps(dict(foreign.config), indent=2))
            for name, file in files.items():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place / name)
    passed_over = set(foreign.tensors) - loaded
    if passed_over:
        raise CheckpointError(
            f"{writer.name} has no place for {len(passed_over)} tensors: {some(passed_over)}. Write huggingface "
            "instead."
        )
    return notes


def _watched(foreign: Foreign) -> tuple[Foreign, set[str]]:
    """The checkpoint, and the names of tensors that were loaded from it so far."""
    loaded: set[str] = set()

    def watch(name: str, tensor: LazyTensor) -> LazyTensor:
        def load() -> torch.Tensor:
            loaded.add(name)
            return tensor.load()

        return replace(tensor, load=load)

    tensors: Mapping[str, LazyTensor] = {name: watch(name, tensor) for name, tensor in foreign.tensors.items()}
    return replace(foreign, tensors=tensors), loaded
