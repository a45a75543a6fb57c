"""Megatron's layers on the process groups of a context, without Megatron's global groups."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from polyshard.adapters.shared.groups import group_context, with_groups
from polyshard.core.context import GroupContext, ParallelContext


def adopt(context: ParallelContext, linear: Any) -> GroupContext:
    """Return a context with Megatron's layers on the process groups of `context`."""
    from polyshard.adapters.megatron import compat

    adopted = with_groups(group_context(context), ("tensor", "data", "pipeline", "expert", "expert_replica"))
    held = contextlib.ExitStack()
    if adopted.layout.sequence_parallel or adopted.layout.expert > 1:
        # Held until shutdown, because the backward pass runs outside of polyshard's calls.
        held.enter_context(compat.sequence_parallel_state(adopted.device))
    return dataclasses.replace(adopted, linear=linear, on_shutdown=(held.close, *adopted.on_shutdown))
