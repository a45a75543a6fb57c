"""Factories without a name by which another process could find them: lambdas, closures, bound objects.

They serve engines in this process only, which is checked at registration and again in every worker.
"""

from __future__ import annotations

import os
from typing import Any

from polyshard.core.errors import RegistrationError
from polyshard.core.serving import ModelFactory, describe

_MARK = "<process>"
_KEPT: dict[str, ModelFactory] = {}  # by reference; module state, because the objects have no importable name

_WAY_OUT = (
    "set VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM is imported (one process, or torchrun with "
    "distributed_executor_backend='external_launcher'), or define the factory at the top level of an importable module"
)


def keep(name: str, factory: ModelFactory) -> str:
    """Keep a factory for the engines of this process, and return its reference.

    Raises:
        RegistrationError: vLLM would run its engine in other processes.
    """
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        raise RegistrationError(
            f"model {name!r}: {describe(factory)} has no name by which another process could find it, but vLLM would "
            f"build it in another process: {_WAY_OUT}"
        )
    reference = f"{_MARK}:{name}"
    _KEPT[reference] = factory
    return reference


def is_kept(reference: str) -> bool:
    """Return whether the reference is that of a factory kept in one process."""
    return reference.startswith(_MARK)


def kept(reference: str) -> Any:
    """Return the factory that this process keeps.

    Raises:
        RegistrationError: the factory is kept by another process.
    """
    if reference not in _KEPT:
        name = reference.rpartition(":")[2]
        raise RegistrationError(
            f"model {name!r} was registered with this_process=True in another process, but this is a worker: {_WAY_OUT}"
        )
    return _KEPT[reference]
