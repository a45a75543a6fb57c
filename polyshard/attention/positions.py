"""Positions of packed tokens are checked where a sliding window counts tokens: a gap would make it reach too far."""

from __future__ import annotations

import torch

from polyshard.core.errors import ConfigurationError


def check_positions(positions: torch.Tensor, cu_seqlens: torch.Tensor, window: int) -> None:
    """Refuse positions that leave tokens out within a sequence longer than a sliding window.

    On the CPU the error names the positions. On a GPU and in a compiled graph it is an asynchronous assertion, which
    does not wait for the device.

    Args:
        positions: int64 `[tokens]`.
        cu_seqlens: `[sequences + 1]`.
        window: of the layer, in tokens.

    Raises:
        ConfigurationError: on the CPU.
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
        torch._assert_async(~wrong.any(), f"positions leave tokens out of a sequence with a sliding window of {window}")
    elif bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        before, after = positions[at : at + 2].tolist()
        raise ConfigurationError(
            f"positions are not consecutive in a sequence longer than the sliding window of {window}: got {before} and "
            f"then {after}, expected {before + 1}: the window would count tokens that are there, not positions. Keep "
            "the tokens between them, or pass rows and an attention mask"
        )
