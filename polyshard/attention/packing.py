"""Checked sequence boundaries."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyshard.core.attention import PackedSequences
from polyshard.core.errors import ConfigurationError

_MOST_TOKENS = 2**31 - 1  # kernels count tokens in int32


def batch_of(batch: int, length: int, device: torch.device) -> PackedSequences:
    """The boundaries of `batch` sequences of one length."""
    _check_count(batch * length)
    host = torch.arange(batch + 1, dtype=torch.int32, device="cpu") * length
    return PackedSequences(_on(host, device), host)


def of_lengths(lengths: Sequence[int], device: torch.device) -> PackedSequences:
    """The boundaries of sequences of these lengths."""
    host = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(torch.int32)
    return PackedSequences(_on(host, device), host)


def pack(cu_seqlens: torch.Tensor, tokens: int) -> PackedSequences:
    """Boundaries from cumulative lengths.

    Args:
        cu_seqlens: integer `[sequences + 1]`; begins with 0, does not fall, and ends with `tokens`. On a GPU, reading
            it waits for what is queued: do it once for a step, and not in every layer.
        tokens: number of packed tokens.

    Raises:
        ConfigurationError: it is not that, or there are more tokens than int32 counts.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ConfigurationError(
            f"cu_seqlens must be integers [sequences + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    _check_count(tokens)
    host = _checked(cu_seqlens, tokens)
    return PackedSequences(_on(host, cu_seqlens.device), host)


@torch.library.custom_op("polyshard::checked_cu_seqlens", mutates_args=())
def _checked(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """A copy on the CPU in int32, after a look at the values; an operator, so that compiled code may hold it."""
    host = cu_seqlens.to("cpu", torch.int64)
    if host[0] != 0 or host[-1] != tokens or bool((host.diff() < 0).any()):
        shown = host[:8].tolist()
        raise ConfigurationError(
            f"cu_seqlens must rise from 0 to the {tokens} tokens given, got {shown} ending in {int(host[-1])}"
        )
    return host.to(torch.int32, copy=True)


@_checked.register_fake
def _(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    del tokens
    return cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int32, device="cpu")


def positions_of(sequences: PackedSequences, tokens: int, device: torch.device) -> torch.Tensor:
    """Position of each packed token in its own sequence, int64 `[tokens]`."""
    index = torch.arange(tokens, device=device)
    cu_seqlens = sequences.cu_seqlens.to(device=device, dtype=torch.int64)
    # The sequence of a token is the last that begins at or before it: empty sequences are stepped over.
    return index - cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]


def _on(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return host if device.type == "cpu" else host.to(device)


def _check_count(tokens: int) -> None:
    if tokens > _MOST_TOKENS:
        raise ConfigurationError(
            f"{tokens} tokens are more than attention kernels can count (int32, {_MOST_TOKENS}): use a smaller batch"
        )
