"""FairScale's one global group, set for the life of a context."""

from __future__ import annotations

import dataclasses
from typing import Any

from polyshard.adapters.shared.groups import group_context, is_alive, with_groups
from polyshard.core.context import GroupContext, ParallelContext
from polyshard.core.errors import AdapterError


def adopt(context: ParallelContext, linear: Any) -> GroupContext:
    """FairScale's layers on the groups of `context`, until it is shut down.

    Raises:
        AdapterError: FairScale already stands on another group; it has one for the whole process.
    """
    from polyshard.adapters.fairscale import compat

    adopted = with_groups(group_context(context), ("tensor", "data"))
    group, previous = adopted.axis("tensor").group, compat.get_group()
    if previous is not None and not is_alive(previous):
        previous = None  # a serving engine destroys its groups without telling its models
    if previous is not None and previous is not group:
        raise AdapterError(
            "FairScale has one tensor-parallel group for the whole process, and another context holds it: shut that "
            "context down first, or use another adapter beside it"
        )
    compat.set_group(group)
    return dataclasses.replace(
        adopted, linear=linear, on_shutdown=(lambda: compat.set_group(previous), *adopted.on_shutdown)
    )
