"""Every tensor of a source is carried, known to be redundant, or the conversion fails and lists it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from polyshard.config.decoder_spec import DecoderSpec
from polyshard.core.errors import CheckpointError

# Buffers that every library computes from the configuration. Their values are not read, so nothing else may match:
# a mask or a table that was learned has another name.
REDUNDANT = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|rope\.freqs|rotary_pos_emb\.inv_freq"
    r"|self_attn\.(causal_mask|attn_mask))$"
)
FREQUENCIES = re.compile(r"(rotary_emb\.inv_freq|rope\.freqs|rotary_pos_emb\.inv_freq)$")

# What a wrapper puts before every name: DistributedDataParallel, torch.compile, Lightning, DeepSpeed and Accelerate.
PREFIXES = ("", "module.", "model.", "app.model.", "_orig_mod.", "module.module.", "state_dict.model.", "app.")


def some(names: Iterable[str], at_most: int = 5) -> str:
    """Names in an error: the first few, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - at_most} more" if len(listed) > at_most else ""
    return ", ".join(listed[:at_most]) + more


def account(where: object, held: Iterable[str], carried: Iterable[str], what_to_do: str = "") -> None:
    """Check that every tensor is carried or redundant.

    Args:
        where: the source, for the error.
        held: names in the source.
        carried: those that the target gets.
        what_to_do: the end of the error, in the imperative.

    Raises:
        CheckpointError: some would be dropped.
    """
    left = [name for name in set(held) - set(carried) if not REDUNDANT.search(name)]
    if left:
        raise CheckpointError(
            f"{where} holds {len(left)} tensors that the configuration's model does not have: unexpected tensors "
            f"{some(left)}. {what_to_do or _ADVICE}"
        )


_ADVICE = (
    "Pass --config with the configuration that belongs to this checkpoint; merge adapters into the model first, and "
    "save heads and other modules apart from it."
)


def check_shapes(where: object, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check logical tensors against the configuration's.

    Raises:
        CheckpointError: some are missing, or of another shape.
    """
    missing = set(expected) - set(found)
    if missing:
        raise CheckpointError(
            f"{where} is incomplete: {len(missing)} of the model's {len(expected)} tensors are missing: "
            f"{some(missing)}. Pass --config with the configuration that belongs to this checkpoint, or the whole "
            "checkpoint."
        )
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(
                f"{where}: {name} has the wrong shape: got {list(found[name])}, expected {list(shape)} by the "
                "configuration. Pass --config with the configuration that belongs to this checkpoint, or the whole "
                "checkpoint."
            )


@dataclass(frozen=True, slots=True)
class Names:
    """Expected names to those found, which differ by a wrapper's prefix, and that prefix."""

    found: dict[str, str]
    prefix: str


def named(where: object, names: Iterable[str], expected: Iterable[str]) -> Names:
    """Find the expected tensors, under one prefix for all of them.

    Raises:
        CheckpointError: names are missing, whatever the prefix; the nearest miss is told.
    """
    held, wanted = set(names), list(expected)
    best: list[str] = wanted
    for prefix in PREFIXES:
        missing = [name for name in wanted if prefix + name not in held]
        if not missing:
            return Names({name: prefix + name for name in wanted}, prefix)
        best = min(best, missing, key=len)
    raise CheckpointError(
        f"{where} is incomplete: {len(best)} of the model's {len(wanted)} tensors are missing: "
        f"{', '.join(best[:5])}; found {len(held)} others, such as {', '.join(sorted(held)[:3])}. Pass --config with "
        "the configuration that belongs to this checkpoint, or the whole checkpoint."
    )


def joined(name: str, parts: Sequence[torch.Tensor], logical: tuple[int, ...], *, padded: bool = False) -> torch.Tensor:
    """Join ranks' parts of a tensor along the dimension in which they are short of it.

    Args:
        name: for errors.
        parts: one of each rank.
        logical: shape of the full tensor.
        padded: the first dimension may be padded with zeros.

    Raises:
        CheckpointError: no single dimension explains the parts, or ranks disagree about a replicated tensor.
    """
    first = tuple(parts[0].shape)
    if first == logical:
        if any(not torch.equal(parts[0], part) for part in parts[1:]):
            raise CheckpointError(
                f"{name} is replicated, but its ranks disagree: got different values, expected equal ones. Find out "
                "which rank is right; training let them drift apart."
            )
        return parts[0]
    if len(first) == len(logical):
        for dim in range(len(logical)):
            others = all(a == b for d, (a, b) in enumerate(zip(first, logical)) if d != dim)
            size = sum(part.shape[dim] for part in parts)
            if others and (size == logical[dim] or (padded and dim == 0 and size > logical[dim])):
                return without_padding(name, torch.cat(list(parts), dim=dim), logical[dim], dim)
    raise CheckpointError(
        f"{name} has the wrong shape: got {len(parts)} part{'s' if len(parts) > 1 else ''} of {list(first)}, expected "
        f"parts of {list(logical)}. Pass --config with the configuration that belongs to this checkpoint, or all of "
        "its ranks."
    )


def without_padding(name: str, full: torch.Tensor, rows: int, dim: int = 0) -> torch.Tensor:
    """The first `rows` of a padded vocabulary.

    Raises:
        CheckpointError: the others are not zeros, so they may be tokens.
    """
    if full.shape[dim] == rows:
        return full
    if full.narrow(dim, rows, full.shape[dim] - rows).count_nonzero():
        raise CheckpointError(
            f"{name} has the wrong shape: got {full.shape[dim]} rows, expected {rows} by the configuration, and the "
            "others are not zeros. Set vocab_size in the configuration to the number of rows, or say with "
            "--pad-vocabulary to which multiple the vocabulary was padded."
        )
    return full.narrow(dim, 0, rows)


def check_frequencies(where: object, name: str, stored: torch.Tensor, spec: DecoderSpec) -> None:
    """Check a stored table of rotary frequencies against the configuration, which replaces it.

    Raises:
        CheckpointError: it is of another rotary embedding.
    """
    expected = rotary_frequencies(spec)
    if expected is None:
        return
    stored = stored.float().flatten()
    if stored.shape != expected.shape or not torch.allclose(stored, expected, rtol=2e-2, atol=1e-9):
        raise CheckpointError(
            f"{where}: {name} is of another rotary embedding: got frequencies from {stored.max():.4g} to "
            f"{stored.min():.4g}, expected {expected.max():.4g} to {expected.min():.4g} by the configuration's "
            f"{spec.rope.kind} embedding with base {spec.rope.theta:g}. Correct the configuration."
        )


def rotary_frequencies(spec: DecoderSpec) -> torch.Tensor | None:
    """Inverse frequencies `[head_dim / 2]` in float32; None for types whose table depends on the sequence's length.

    Source: transformers' `modeling_rope_utils` for `linear` and `llama3`.
    """
    rope = spec.rope
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float64) / spec.head_dim
    frequencies = rope.theta**-exponents
    if rope.get("partial_rotary_factor") is not None or rope.kind not in ("default", "linear", "llama3"):
        return None
    if rope.kind == "linear":
        frequencies = frequencies / rope.get("factor")
    if rope.kind == "llama3":
        factor, low, high = (rope.get(n) for n in ("factor", "low_freq_factor", "high_freq_factor"))
        turns = rope.get("original_max_position_embeddings") * frequencies / (2 * torch.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - smooth) * frequencies / factor + smooth * frequencies
    return frequencies.float()
