"""Operators that torch.compile calls by name without tracing into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("polyshard", "FRAGMENT")


def bare_operator(schema: str, compute: Callable[..., Any], shape: Callable[..., Any], key: str = "CPU") -> Any:
    """Register an operator without backward.

    The overhead per call of `torch.library.custom_op` would be that of a small matmul.

    Args:
        schema: torch schema without a namespace: `name(Tensor x) -> Tensor`.
        compute: the implementation.
        shape: returns tensors without data in the outputs' shapes, from the same arguments.
        key: the dispatch key of `compute`.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, compute, key)
    torch.library.register_fake(f"polyshard::{name}", shape, lib=_LIBRARY)
    return getattr(torch.ops.polyshard, name).default
