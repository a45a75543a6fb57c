"""Options of a library's wrapper that users set by the library's own names."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Collection, Mapping
from typing import Any

from polyshard.core.errors import ConfigurationError

# Arguments of DistributedDataParallel that the engine sets, or that conflict with what it does.
_DDP_RESERVED = frozenset(
    {
        "module",
        "process_group",
        "device_ids",
        "output_device",
        "dim",
        "device_mesh",
        "init_sync",  # without it, ranks may start from different weights
        "mixed_precision",  # polyshard.Precision
        "check_reduction",
        "delay_all_reduce_named_params",
        "param_to_hook_all_reduce",
    }
)

_SIZES = frozenset({"bucket_cap_mb", "bucket_size", "reduce_buffer_size"})


def checked_options(name: str, options: Mapping[str, Any] | None, allowed: Collection[str]) -> dict[str, Any]:
    """Return a copy of the options.

    Args:
        name: name of the engine's argument, for the error.
        options: what the user passed; None for nothing.
        allowed: names that may be set.

    Raises:
        ConfigurationError: a name is not allowed, or a value is text or no size.

    Examples:
        >>> checked_options("ddp_options", {"bucket_cap_mb": 50}, {"bucket_cap_mb"})
        {'bucket_cap_mb': 50}
    """
    if options is not None and not isinstance(options, Mapping):
        raise ConfigurationError(f"{name} is invalid: got {type(options).__name__}, expected a mapping of names.")
    unexpected = sorted(set(options or {}) - set(allowed))
    if unexpected:
        raise ConfigurationError(
            f"{name} has unexpected names: got {', '.join(unexpected)}, expected some of {', '.join(sorted(allowed))}."
        )
    for option, value in (options or {}).items():
        is_size = isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf
        if isinstance(value, str) or (option in _SIZES and value is not None and not is_size):
            expected = "a number of 0 or more" if option in _SIZES else "no text"
            raise ConfigurationError(f"{name} has an invalid value: got {option}={value!r}, expected {expected}.")
    return dict(options or {})


def parameters_of(function: Callable[..., Any], reserved: Collection[str]) -> set[str]:
    """Return the names of a callable's parameters that are not reserved."""
    return set(inspect.signature(function).parameters) - set(reserved)


def ddp_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return checked options of torch's DistributedDataParallel.

    Raises:
        ConfigurationError: a name that the installed version lacks, or that the engine sets itself.
    """
    from torch.nn.parallel import DistributedDataParallel

    return checked_options("ddp_options", options, parameters_of(DistributedDataParallel, _DDP_RESERVED))
