"""Validation of positions for sliding windows: kernels count tokens, so a gap in positions would widen the window."""

from __future__ import annotations

import torch

from polyshard.core.errors import ConfigurationError


def check_positions(positions: torch.Tensor, cu_seqlens: torch.Tensor, window: int) -> None:
    """Raise an error if positions are not consecutive within a sequence that is longer than the sliding window.

    On the CPU the error names the positions. On a GPU and in a compiled graph it is an asynchronous assertion, which
    does not synchronize the device.

    Args:
        positions: int64 `[tokens]`.
        cu_seqlens: `[sequences + 1]`.
        window: the layer's sliding window, in tokens.

    Raises:
        ConfigurationError: the positions are not consecutive (only on the CPU).
    """
    if positions.shape[0] < 2 or positions.device.type == "meta":
        return
    bounds = cu_seqlens.to(device=positions.device, dtype=torch.int64)
    token = torch.arange(1, positions.shape[0], device=positions.device)
    sequence = torch.searchsorted(bounds, token, right=True) - 1
    begins = bounds[sequence] == token
    reaches = bounds.diff()[sequence] > window
    wrong = (positions.diff() != 1) & ~begins & reaches
    if positions.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(
            ~wrong.any(), f"positions are not consecutive in a sequence longer than the sliding window of {window}"
        )
    elif bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        before, after = positions[at : at + 2].tolist()
        raise ConfigurationError(
            f"positions are not consecutive in a sequence longer than the sliding window of {window}: got {before} and "
            f"then {after}, expected {before + 1}. Kernels count the tokens of a window, not positions. Keep the "
            "tokens in between, or pass padded rows and an attention mask."
        )
