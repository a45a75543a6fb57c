"""Optimizer offload: state and update on the CPU, with parameters on a GPU."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from polyshard.core.errors import ConfigurationError

logger = logging.getLogger(__name__)

Offload = Literal["none", "optimizer"]


def check_offload(offload: str, device: torch.device, possible: bool, expected: str) -> bool:
    """Return whether to offload; warn on a rank that computes on the CPU, where nothing is saved.

    Args:
        offload: the user's.
        device: of the rank.
        possible: whether the engine's other options allow it.
        expected: the options that do, for the message.

    Raises:
        ConfigurationError: the value is unknown, or the other options do not allow it.
    """
    if offload not in ("none", "optimizer"):
        raise ConfigurationError(f"offload is unknown: got {offload!r}, expected 'none' or 'optimizer'.")
    if offload == "none":
        return False
    if not possible:
        raise ConfigurationError(f"offload='optimizer' is unsupported with these options, expected {expected}.")
    if device.type == "cpu":
        logger.warning("offload='optimizer' saves no memory: this rank computes on the CPU")
    return True
