"""Conversion of checkpoint names to the names of the model's own parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from polyshard.core.errors import RegistrationError
from polyshard.registry.reference import reference_of, resolve

NameMap = Mapping[str, str] | Callable[[str], str] | str


def check_names(names: NameMap) -> dict[str, str] | str:
    """Return a name map in the form that is sent to workers: regular expressions, or the reference of a function.

    Raises:
        RegistrationError: an expression is malformed, or workers could not find the function.
    """
    if isinstance(names, Mapping):
        renamer(names)
        return dict(names)
    reference = names if isinstance(names, str) else reference_of(names)
    renamer(reference)
    return reference


def renamer(names: Mapping[str, str] | str) -> Callable[[str], str]:
    """Return the function from a checkpoint name to the model's own.

    Args:
        names: `{regular expression: replacement}`, applied in order by `re.sub`, or `module:function`.

    Raises:
        RegistrationError: the value is neither.

    Examples:
        >>> renamer({"^transformer": "model"})("transformer.norm.weight")
        'model.norm.weight'
    """
    if isinstance(names, str):
        function: Any = resolve(names)
        if not callable(function):
            raise RegistrationError(f"names is invalid: {names} is a {type(function).__name__}, expected a function")
        return function
    rules = []
    for pattern, replacement in names.items():
        try:
            rules.append((re.compile(pattern), replacement))
            re.sub(pattern, replacement, "")
        except (re.error, IndexError, TypeError) as error:
            raise RegistrationError(
                f"names is invalid: {pattern!r} -> {replacement!r} is not a regular expression and replacement: {error}"
            ) from None

    def rename(name: str) -> str:
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
        return name

    return rename
