"""A user's own names of weights: from those of a checkpoint to those of the model's layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from polyshard.core.errors import RegistrationError
from polyshard.registry.reference import reference_of, resolve

NameMap = Mapping[str, str] | Callable[[str], str] | str


def check_names(names: NameMap) -> dict[str, str] | str:
    """A map as it travels to workers: regular expressions, or the reference of a function.

    Raises:
        RegistrationError: an expression is malformed, or no worker could find the function.
    """
    if isinstance(names, Mapping):
        renamer(names)
        return dict(names)
    reference = names if isinstance(names, str) else reference_of(names)
    renamer(reference)
    return reference


def renamer(names: Mapping[str, str] | str) -> Callable[[str], str]:
    """The function from a stored name to the model's.

    Args:
        names: `{regular expression: replacement}`, each applied in turn by `re.sub`, or `module:function`.

    Raises:
        RegistrationError: it is neither.
    """
    if isinstance(names, str):
        function: Any = resolve(names)
        if not callable(function):
            raise RegistrationError(f"names: {names} is a {type(function).__name__}, expected a function of a name")
        return function
    rules = []
    for pattern, replacement in names.items():
        try:
            rules.append((re.compile(pattern), replacement))
            re.sub(pattern, replacement, "")
        except (re.error, IndexError, TypeError) as error:
            raise RegistrationError(
                f"names: {pattern!r} -> {replacement!r} is no regular expression with its replacement: {error}"
            ) from None

    def rename(name: str) -> str:
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
        return name

    return rename
