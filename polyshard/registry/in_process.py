"""Factories that have no name by which another process could find them: lambdas, closures, bound objects.

They serve engines of this process alone, which is checked when they are registered, and again in every worker.
"""

from __future__ import annotations

import os
from typing import Any

from polyshard.core.errors import RegistrationError
from polyshard.core.serving import ModelFactory, describe

_MARK = "<process>"
_KEPT: dict[str, ModelFactory] = {}  # by reference; an object without a name can be kept nowhere else

_WAY_OUT = (
    "set VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM is imported (one process, or torchrun with "
    "distributed_executor_backend='external_launcher'), or define the factory at the top level of an importable module"
)


def keep(name: str, factory: ModelFactory) -> str:
    """Keep a factory for the engines of this process, and give its reference.

    Raises:
        RegistrationError: engines of this process would start others.
    """
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        raise RegistrationError(
            f"model {name!r}: {describe(factory)} has no name by which another process could find it, and vLLM would "
            f"build it in one: {_WAY_OUT}"
        )
    reference = f"{_MARK}:{name}"
    _KEPT[reference] = factory
    return reference


def is_kept(reference: str) -> bool:
    """Whether it is the reference of an object without a name."""
    return reference.startswith(_MARK)


def kept(reference: str) -> Any:
    """The factory that this process keeps.

    Raises:
        RegistrationError: another process keeps it.
    """
    if reference not in _KEPT:
        name = reference.rpartition(":")[2]
        raise RegistrationError(
            f"model {name!r} was registered with this_process=True in another process, and this is a worker: {_WAY_OUT}"
        )
    return _KEPT[reference]
