"""Accounting for every tensor of a source: it is carried or redundant, or the conversion fails and lists it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from polyshard.config.decoder_spec import DecoderSpec
from polyshard.core.errors import CheckpointError

# Buffers that every library computes from the configuration. Their values are not read, so the pattern must not match a
# learned mask or table.
REDUNDANT = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|rope\.freqs|rotary_pos_emb\.inv_freq"
    r"|self_attn\.(causal_mask|attn_mask))$"
)
FREQUENCIES = re.compile(r"(rotary_emb\.inv_freq|rope\.freqs|rotary_pos_emb\.inv_freq)$")

# Prefixes that wrappers add to every name: DistributedDataParallel, torch.compile, Lightning, DeepSpeed and Accelerate.
PREFIXES = ("", "module.", "model.", "app.model.", "_orig_mod.", "module.module.", "state_dict.model.", "app.")


def some(names: Iterable[str], at_most: int = 5) -> str:
    """Format names for an error: the first few, and the number of the others.

    Examples:
        >>> some(["c", "a", "b"], at_most=2)
        'a, b and 1 more'
    """
    listed = sorted(names)
    more = f" and {len(listed) - at_most} more" if len(listed) > at_most else ""
    return ", ".join(listed[:at_most]) + more


def account(where: object, held: Iterable[str], carried: Iterable[str], what_to_do: str = "") -> None:
    """Check that every tensor is carried or redundant.

    Args:
        where: the source, for the error.
        held: the names in the source.
        carried: the names that the target gets.
        what_to_do: the last sentence of the error, in the imperative.

    Raises:
        CheckpointError: some tensors would be dropped.

    Examples:
        >>> account("source", ["a.weight", "rotary_emb.inv_freq"], ["a.weight"])
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
    """Check logical tensors against the shapes that the configuration implies.

    Raises:
        CheckpointError: tensors are missing or have the wrong shape.
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
    """The mapping from expected to found names, which differ by a wrapper's prefix, and the prefix."""

    found: dict[str, str]
    prefix: str


def named(where: object, names: Iterable[str], expected: Iterable[str]) -> Names:
    """Find the expected tensors, all under the same prefix.

    Raises:
        CheckpointError: names are missing under every prefix; the message reports the prefix with the fewest.
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
    """Join the ranks' parts of a tensor along the one dimension in which they are smaller than the tensor.

    Args:
        name: the tensor's name, for errors.
        parts: one part from each rank.
        logical: shape of the full tensor.
        padded: whether the first dimension may be padded with zeros.

    Raises:
        CheckpointError: no single dimension explains the parts, or the ranks' copies of a replicated tensor differ.
    """
    first = tuple(parts[0].shape)
    if first == logical:
        if any(not torch.equal(parts[0], part) for part in parts[1:]):
            raise CheckpointError(
                f"{name} is replicated, but its ranks disagree: got different values, expected equal ones. Find out "
                "which rank is right; the copies diverged during training."
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
    """Return the first `rows` rows of a padded vocabulary.

    Raises:
        CheckpointError: the other rows are not zeros, so they may be tokens.
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
    """Check a stored table of rotary frequencies against the configuration, from which the target computes its own.

    Raises:
        CheckpointError: the table belongs to a different rotary embedding.
    """
    expected = rotary_frequencies(spec)
    if expected is None:
        return
    stored = stored.float().flatten()
    if stored.shape != expected.shape or not torch.allclose(stored, expected, rtol=2e-2, atol=1e-9):
        raise CheckpointError(
            f"{where}: {name} belongs to a different rotary embedding: got frequencies from {stored.max():.4g} to "
            f"{stored.min():.4g}, expected {expected.max():.4g} to {expected.min():.4g} for a {spec.rope.kind} "
            f"embedding with base {spec.rope.theta:g}. Correct the configuration."
        )


def rotary_frequencies(spec: DecoderSpec) -> torch.Tensor | None:
    """Return inverse frequencies, float32 `[head_dim / 2]`; None for types whose table depends on the sequence length.

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
