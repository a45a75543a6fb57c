"""Construction of sequence boundaries (`PackedSequences`), with validation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyshard.core.attention import PackedSequences
from polyshard.core.errors import ConfigurationError

_MAX_TOKENS = 2**31 - 1  # kernels count tokens in int32


def batch_of(batch: int, length: int, device: torch.device) -> PackedSequences:
    """Return the boundaries of `batch` sequences of equal length."""
    _check_count(batch * length)
    host = torch.arange(batch + 1, dtype=torch.int32, device="cpu") * length
    return PackedSequences(_on(host, device), host)


def of_lengths(lengths: Sequence[int], device: torch.device) -> PackedSequences:
    """Return the boundaries of sequences of the given lengths."""
    host = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(torch.int32)
    return PackedSequences(_on(host, device), host)


def pack(cu_seqlens: torch.Tensor, tokens: int) -> PackedSequences:
    """Check cumulative lengths and return them as `PackedSequences`.

    On a GPU this synchronizes the device. Call it once for each step, not in every layer.

    Args:
        cu_seqlens: integer `[sequences + 1]`, non-decreasing from 0 to `tokens`.
        tokens: number of packed tokens.

    Raises:
        ConfigurationError: `cu_seqlens` is invalid, or `tokens` does not fit into int32.

    Examples:
        >>> pack(torch.tensor([0, 3, 7]), tokens=7).lengths
        (3, 4)
    """
    if not isinstance(cu_seqlens, torch.Tensor):
        raise ConfigurationError(
            f"cu_seqlens is no tensor: got {type(cu_seqlens).__name__}, expected integers [sequences + 1]. Pass "
            "torch.tensor(...) of it."
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ConfigurationError(
            f"cu_seqlens is invalid: got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, expected integers "
            "[sequences + 1]."
        )
    _check_count(tokens)
    host = _checked(cu_seqlens, tokens)
    return PackedSequences(_on(host, cu_seqlens.device), host)


@torch.library.custom_op("polyshard::checked_cu_seqlens", mutates_args=())
def _checked(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """Check the values and return a copy on the CPU in int32. A custom operator, so that torch.compile can trace it."""
    host = cu_seqlens.to("cpu", torch.int64)
    if host[0] != 0 or host[-1] != tokens or bool((host.diff() < 0).any()):
        shown = host[:8].tolist()
        raise ConfigurationError(
            f"cu_seqlens is invalid: got {shown} ending in {int(host[-1])}, expected non-decreasing values from 0 to "
            f"{tokens}, the number of tokens."
        )
    return host.to(torch.int32, copy=True)


@_checked.register_fake
def _(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    del tokens
    return cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int32, device="cpu")


def positions_of(sequences: PackedSequences, tokens: int, device: torch.device) -> torch.Tensor:
    """Return the position of each packed token in its sequence, int64 `[tokens]`."""
    index = torch.arange(tokens, device=device)
    cu_seqlens = sequences.cu_seqlens.to(device=device, dtype=torch.int64)
    # A token belongs to the last sequence that begins at or before it, which skips empty sequences.
    return index - cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]


def _on(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return host if device.type == "cpu" else host.to(device)


def _check_count(tokens: int) -> None:
    if tokens > _MAX_TOKENS:
        raise ConfigurationError(
            f"The batch is too large: got {tokens} tokens, expected at most {_MAX_TOKENS}, the largest int32. Use a "
            "smaller batch."
        )
