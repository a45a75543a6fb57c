"""Conversion of a checkpoint from any readable to any writable format, with optional verification."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from polyshard.checkpoint.companions import companions, has_tokenizer
from polyshard.checkpoint.directory import begin, behind_link, publish, reason, staging_name
from polyshard.checkpoint.location import as_path, is_remote
from polyshard.checkpoint.model_code import check_code
from polyshard.checkpoint.quantization.dequantize import dequantized
from polyshard.checkpoint.quantization.detect import FLOATS, refuse_codes
from polyshard.checkpoint.remote.transfer import download_checkpoint, upload_checkpoint
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
    "Pass --dtype to dequantize FP8, compressed-tensors' int8 and float8, and MXFP4; dequantize other formats with the "
    "library that wrote them. Without --dtype, Hugging Face directories are copied as they are."
)
_CODE_ADVICE = "Copy it into the source, or remove auto_map from the configuration."

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        found: description of the source.
        source: format of the source.
        target: format of the target.
        tensors: number of tensors.
        nbytes: size of the tensors as read.
        notes: what was left out or changed.
        verified: number of tensors that were read back and compared; None without verification.
        logits: the largest difference of logits; None if they were not compared.
        compared: descriptions of what was compared.
        not_compared: descriptions of what was not compared, with reasons.

    Examples:
        >>> done = Conversion(found="a file", source="gguf", target="huggingface", tensors=9, nbytes=36, notes=())
        >>> done.verified is None
        True
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
    source: str | Path,
    target: str | Path,
    *,
    from_format: str | None = None,
    to_format: str = "huggingface",
    options: Options | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint. Every tensor is carried, or the conversion fails and lists the tensors it would drop.

    Args:
        source: a file or directory, or the URL of a directory on a remote file system, which is copied first.
        target: a directory that is new or empty; it is written atomically. For the format huggingface also a URL.
        from_format: name of the source's format; detected by default.
        to_format: name of the target's format.
        options: see `Options`.
        dtype: dtype to store; by default that of each tensor.
        verify: read the target back and compare the fingerprint of every tensor, and compare the logits of source and
            target with readers that took no part in the conversion.
        progress: called with (bytes written, total bytes).

    Raises:
        CheckpointError: the source cannot be read or holds data that the target would lose, the target is not empty or
            cannot be written, a value does not fit the dtype, or the verification fails. Nothing is left behind.

    Examples:
        >>> context = ps.initialize("torch")
        >>> source = ps.save_checkpoint(torch.nn.Linear(2, 2), "source", context, config={"model_type": "example"})
        >>> done = convert(source, Path("target"), dtype=torch.bfloat16)
        >>> done.tensors, ps.read_config("target").dtype
        (2, 'bfloat16')
    """
    settings: dict[str, Any] = {"from_format": from_format, "to_format": to_format, "options": options, "dtype": dtype}
    source, target = as_path(source), as_path(target)
    if is_remote(source):
        with tempfile.TemporaryDirectory(prefix="polyshard-convert-") as folder:
            copied = download_checkpoint(source, Path(folder) / source.name)
            return convert(copied, target, **settings, verify=verify, progress=progress)
    if is_remote(target):
        if to_format != HuggingFaceFormat.name:
            raise CheckpointError(f"{to_format} can be written to a local directory only: got {target}")
        if target.is_dir():
            raise CheckpointError(f"{target} exists and is not empty. Name a new directory.")
        with tempfile.TemporaryDirectory(prefix="polyshard-convert-") as folder:
            done = convert(source, Path(folder) / target.name, **settings, verify=verify, progress=progress)
            upload_checkpoint(Path(folder) / target.name, target)
            return done
    options = options or Options()
    if dtype is not None and dtype not in FLOATS:
        raise CheckpointError(f"dtype is unsupported: got {dtype}, expected one of {', '.join(map(str, FLOATS))}")
    reader, found = detect(source) if from_format is None else (format_named(from_format), from_format)
    writer = format_named(to_format)
    if not writer.writes:
        writer.write(Foreign(tensors={}), target, options)  # raises an error that names a format to write instead
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "is not empty" if target.is_dir() else "is a file"
        raise CheckpointError(f"{target} exists and {what}. Name a new directory.")
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
    real = behind_link(target)
    staging = real.parent / staging_name(real)
    place = staging / "target"
    proof: Proof | None = None
    try:
        begin(real, staging)
        notes += _write(written, writer, place, options, reader.name, progress)
        notes += casts.notes() if casts is not None else ()
        if verify:
            ours = Side(format=reader, path=source, options=replace(options, allow_pickle=True, config=foreign.config))
            theirs = Side(format=writer, path=place, options=Options(allow_pickle=True))  # written by this process
            proof = prove(written, ours, theirs, rounded=dtype)
        publish(place, real)
    except OSError as error:
        told = reason(error, staging, target)
        raise CheckpointError(f"writing {target} failed; nothing was changed: {told}") from error
    except CheckpointError as error:
        if str(staging) not in str(error):
            raise
        raise CheckpointError(reason(error, staging, target)) from error
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
    """Return the configuration with the requested dtype, and with `architectures` if the family implies it."""
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
    """Write weights, configuration and companion files, and return notes.

    Raises:
        CheckpointError: the writer skipped a tensor without reporting it.
    """
    if foreign.config is None:
        options.need_config(source)
    assert foreign.config is not None
    watched, loaded = _watched(foreign)
    notes: list[str] = []
    beside, is_model = foreign.companions, source.startswith("huggingface")
    files, left = companions(beside, is_model=is_model) if beside is not None else ({}, ())
    notes += left
    with tempfile.TemporaryDirectory(prefix="polyshard-tokenizer-") as folder:
        if foreign.tokenizer is not None:
            notes += foreign.tokenizer(Path(folder))
            files |= {file.name: file for file in Path(folder).iterdir()}
        if not has_tokenizer(files):
            notes.append("the source has no tokenizer that can be converted; copy the model's own beside the weights")
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
    skipped = set(foreign.tensors) - loaded
    if skipped:
        raise CheckpointError(
            f"{writer.name} cannot store {len(skipped)} tensors: {some(skipped)}. Write huggingface instead."
        )
    return notes


def _watched(foreign: Foreign) -> tuple[Foreign, set[str]]:
    """Return the checkpoint and a set that collects the names of the tensors loaded from it."""
    loaded: set[str] = set()

    def watch(name: str, tensor: LazyTensor) -> LazyTensor:
        def load() -> torch.Tensor:
            loaded.add(name)
            return tensor.load()

        return replace(tensor, load=load)

    tensors: Mapping[str, LazyTensor] = {name: watch(name, tensor) for name, tensor in foreign.tensors.items()}
    return replace(foreign, tensors=tensors), loaded
