"""Operators that a compiled graph calls by name: its compiler looks at tensors, and not into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("polyshard", "FRAGMENT")


def bare_operator(schema: str, compute: Callable[..., Any], shape: Callable[..., Any], key: str = "CPU") -> Any:
    """An operator without a backward. Bare: `torch.library.custom_op` takes as long for each call as a small product.

    Args:
        schema: as torch writes it, without a namespace: `name(Tensor x) -> Tensor`.
        compute: what it does.
        shape: gives tensors without data of the outputs' shapes, of the same arguments.
        key: the dispatch key of `compute`.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, compute, key)
    torch.library.register_fake(f"polyshard::{name}", shape, lib=_LIBRARY)
    return getattr(torch.ops.polyshard, name).default
