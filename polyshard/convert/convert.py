"""From any format that can be read to any that can be written, with proof."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyshard.checkpoint.stream import write_tensors
from polyshard.convert.formats import detect, format_named
from polyshard.convert.huggingface import HuggingFaceFormat
from polyshard.core.errors import CheckpointError
from polyshard.core.fingerprint import fingerprint
from polyshard.core.foreign import Foreign, Options

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
        notes: what was passed over.
        verified: how many tensors were read back and compared; None where that was not asked for.
        logits: the largest difference of logits, where it could be computed.
    """

    found: str
    source: str
    target: str
    tensors: int
    nbytes: int
    notes: tuple[str, ...]
    verified: int | None = None
    logits: float | None = None


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
    """Convert a checkpoint.

    Args:
        source: file or directory.
        target: a directory that does not exist yet; it is there whole afterwards, or not at all.
        from_format: by name; default what is detected.
        to_format: by name.
        options: see `Options`.
        dtype: of the tensors written; default as they are.
        verify: read the target back and compare every tensor's fingerprint, and the logits where transformers knows
            the model.
        progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: the source cannot be read, the target exists or cannot be written, or the proof fails.
    """
    options = options or Options()
    reader, found = detect(source) if from_format is None else (format_named(from_format), from_format)
    writer = format_named(to_format)
    if not writer.writes:
        writer.write(Foreign(tensors={}), target, options)  # says what to write instead
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target} exists and is not empty: name a new directory")
    foreign = reader.read(source, options)
    if dtype is not None and not dtype.is_floating_point:
        raise CheckpointError(f"dtype must be a floating-point one, got {dtype}")
    cast = foreign if dtype is None else _cast(foreign, dtype)
    if isinstance(writer, HuggingFaceFormat):
        if cast.config is None:
            options.need_config(reader.name)
        assert cast.config is not None
        listed = [(name, tensor.shape, tensor.dtype, tensor.load) for name, tensor in cast.tensors.items()]
        write_tensors(target, listed, cast.config, companions=cast.companions, progress=progress)
    else:
        staging = target.parent / f".{target.name}.converting-{os.getpid()}-{secrets.token_hex(4)}"
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        try:
            writer.write(cast, staging, options)
            if target.exists():
                target.rmdir()
            os.rename(staging, target)
        except OSError as error:
            raise CheckpointError(f"writing {target} failed, and nothing was changed: {error}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    verified = logits = None
    if verify:
        back = Options(config=cast.config, allow_pickle=True)  # what was written a moment ago
        again = writer.read(target, back)
        verified = compare(cast, again)
        logits = compare_logits(cast, again)
    return Conversion(
        found=found,
        source=reader.name,
        target=writer.name,
        tensors=len(foreign.tensors),
        nbytes=sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in foreign.tensors.values()),
        notes=foreign.notes,
        verified=verified,
        logits=logits,
    )


def compare(first: Foreign, second: Foreign) -> int:
    """How many tensors are alike, bit for bit.

    Raises:
        CheckpointError: some differ, or are in one alone.
    """
    only = sorted(set(first.tensors) ^ set(second.tensors))
    if only:
        raise CheckpointError(f"verification failed: {len(only)} tensors are on one side alone: {', '.join(only[:5])}")
    for name, tensor in first.tensors.items():
        if fingerprint(tensor.load()) != fingerprint(second.tensors[name].load()):
            raise CheckpointError(f"verification failed: {name} was written otherwise than it was read")
    return len(first.tensors)


def compare_logits(first: Foreign, second: Foreign, tokens: int = 16) -> float | None:
    """Largest difference of logits of the two in transformers; None where it does not know the model.

    Raises:
        CheckpointError: they are not equal, bit for bit.
    """
    config = first.config
    if config is None:
        return None
    try:
        import transformers

        known = transformers.AutoConfig.for_model(**_for_transformers(config))
        model = transformers.AutoModelForCausalLM.from_config(known)
    except (ImportError, ValueError, KeyError, AttributeError):
        return None
    ids = torch.arange(tokens)[None] % config["vocab_size"]
    results = []
    for side in (first, second):
        state = {name: tensor.load() for name, tensor in side.tensors.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        loose = [name for name in missing if name != "lm_head.weight"]
        if loose or unexpected:
            raise CheckpointError(
                f"verification failed: transformers misses {loose[:3]}, and knows no {unexpected[:3]}"
            )
        model.tie_weights()
        with torch.no_grad():
            results.append(model.eval()(ids).logits.float())
    difference = float((results[0] - results[1]).abs().max())
    if difference != 0.0:
        raise CheckpointError(f"verification failed: logits differ by up to {difference:.2e}")
    return difference


def read_config_fields(path: Path) -> dict[str, Any]:
    """config.json's fields, of a directory or a file."""
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is no readable config.json: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} holds a {type(fields).__name__}, expected a JSON object")
    return fields


def _for_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("architectures", "polyshard", "dtype")}


def _cast(foreign: Foreign, dtype: torch.dtype) -> Foreign:
    from dataclasses import replace

    tensors = {
        name: replace(t, dtype=dtype, load=lambda t=t: t.load().to(dtype)) for name, t in foreign.tensors.items()
    }
    return replace(foreign, tensors=tensors)
