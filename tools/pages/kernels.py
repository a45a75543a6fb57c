"""Attention kernels and the features that each supports, as the kernels themselves answer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import torch

from polyshard.attention.kernels.cpu.native import unsupported_feature
from polyshard.attention.kernels.protocol import AttentionKernel
from polyshard.attention.selection import KERNELS
from polyshard.core.attention import AttentionSpec
from tools.pages.tables import markdown

KERNEL_PACKAGE = "polyshard.attention.kernels"
PLAIN = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, scale=0.125)
FEATURES = {
    "causal": PLAIN,
    "not causal": replace(PLAIN, causal=False),
    "window": replace(PLAIN, sliding_window=8),
    "soft-cap": replace(PLAIN, softcap=30.0),
    "ALiBi": replace(PLAIN, alibi_slopes=(0.5, 0.25, 0.125, 0.0625)),
    "sinks": replace(PLAIN, sinks=True),
    "dropout": replace(PLAIN, dropout=0.1),
    "other value size": replace(PLAIN, value_dim=32),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def table() -> str:
    # As on a GPU of compute capability 9.0, with every package and a C++ compiler installed.
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)))
        stack.enter_context(mock.patch(f"{KERNEL_PACKAGE}.cpu.native.unavailable_reason", return_value=None))
        stack.enter_context(mock.patch(f"{KERNEL_PACKAGE}.cpu.native.width", return_value=16))
        for name in ("flash_attn_2", "flash_attn_3", "flash_attn_4"):
            stack.enter_context(mock.patch(f"{KERNEL_PACKAGE}.cuda.{name}.find_spec"))
        unsupported_feature.cache_clear()
        rows = [_row(kernel) for kernel in KERNELS if kernel.name != "meta"]  # it computes no numbers
        unsupported_feature.cache_clear()
    return markdown(("kernel", "device", "dtypes", *FEATURES), rows)


def _row(kernel: AttentionKernel) -> list[str]:
    def supports(spec: AttentionSpec, device: str, dtype: torch.dtype) -> bool:
        return kernel.unsupported_reason(spec, torch.device(device), dtype, True) is None

    devices = [d for d in ("cuda", "cpu") if any(supports(PLAIN, d, dtype) for dtype in DTYPES.values())]
    dtypes = [name for name, dtype in DTYPES.items() if any(supports(PLAIN, d, dtype) for d in devices)]
    marks = [
        "yes" if any(supports(spec, d, DTYPES[name]) for d in devices for name in dtypes) else "no"
        for spec in FEATURES.values()
    ]
    return [f"`{kernel.name}`", ", ".join(devices), ", ".join(dtypes), *marks]
