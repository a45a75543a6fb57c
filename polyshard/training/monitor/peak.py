"""The peak of a device: FLOPs per second of dense matrix products, from data sheets or measured."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

import torch

# Dense FLOPs per second in bfloat16, by a word in the name that torch gives to the device; the first that fits.
# Sources: the vendors' data sheets (values "with sparsity" halved).
BFLOAT16: Mapping[str, float] = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "MI355X": 2500e12,
    "MI325X": 1307e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,  # of one of its two dies, which torch shows as a device
}


def known_peak_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Return a GPU's dense peak in 16-bit floats from its data sheet; None if it is not known.

    Args:
        device: a CUDA or ROCm device.
        dtype: the dtype of matrix products: bfloat16 or float16; None is returned for others.

    Returns:
        FLOPs per second.

    Examples:
        >>> known_peak_flops(torch.device("cpu")) is None
        True
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    # A whole word: an RTX A4000 is not an A40.
    return next((peak for part, peak in BFLOAT16.items() if re.search(rf"\b{part}\b", name)), None)


def measured_peak_flops(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, *, size: int | None = None, seconds: float = 0.5
) -> float:
    """Measure the FLOPs per second of a square matrix product: what this device reaches, not what it is sold as.

    Args:
        device: the device; on a CPU with torch's threads.
        dtype: dtype of the product.
        size: rows and columns; default 8192 on a GPU, and 1024 on a CPU.
        seconds: how long to repeat it; the best time counts.

    Returns:
        FLOPs per second.

    Examples:
        >>> measured_peak_flops(torch.device("cpu"), torch.float32, size=64, seconds=0.01) > 1e6
        True
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, generator=_generator(device)).to(dtype) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds or best == float("inf"):
        torch.mm(a, b)  # warms up before the first measurement, too
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done its work; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _generator(device: torch.device) -> torch.Generator:
    """Return a generator of its own: a measurement must not change the run's random numbers."""
    return torch.Generator(device).manual_seed(0)
