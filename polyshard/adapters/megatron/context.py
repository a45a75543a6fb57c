"""Megatron's layers on the groups of a context; Megatron's own global groups are never made."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from polyshard.adapters.shared.groups import group_context, with_groups
from polyshard.core.context import GroupContext, ParallelContext


def adopt(context: ParallelContext, linear: Any) -> GroupContext:
    """Megatron's layers on the groups of `context`, until it is shut down."""
    from polyshard.adapters.megatron import compat

    adopted = with_groups(group_context(context), ("tensor", "data", "pipeline"))
    held = contextlib.ExitStack()
    if adopted.layout.sequence_parallel:
        # The backward runs outside of any call of ours.
        held.enter_context(compat.sequence_parallel_state(adopted.device))
    return dataclasses.replace(adopted, linear=linear, on_shutdown=(held.close, *adopted.on_shutdown))
