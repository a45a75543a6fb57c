"""FairScale's global group, set for the life of a context."""

from __future__ import annotations

import dataclasses
from typing import Any

from polyshard.adapters.shared.groups import group_context, is_alive, with_groups
from polyshard.core.context import GroupContext, ParallelContext
from polyshard.core.errors import AdapterError


def adopt(context: ParallelContext, linear: Any) -> GroupContext:
    """Return a context with FairScale's layers on the process groups of `context`, until it is shut down.

    Raises:
        AdapterError: FairScale's single group is in use by another context.
    """
    from polyshard.adapters.fairscale import compat

    adopted = with_groups(group_context(context), ("tensor", "data", "expert_replica"))
    group, previous = adopted.axis("tensor").group, compat.get_group()
    if previous is not None and not is_alive(previous):
        previous = None  # a serving engine destroys its groups without notice
    if previous is not None and previous is not group:
        raise AdapterError(
            "FairScale has one tensor-parallel group for the whole process, and another context uses it. Shut that "
            "context down first, or use another adapter beside it"
        )
    compat.set_group(group)
    return dataclasses.replace(
        adopted, linear=linear, on_shutdown=(lambda: compat.set_group(previous), *adopted.on_shutdown)
    )
