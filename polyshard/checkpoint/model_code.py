"""The Python files that a model's configurations name (`auto_map`): they are read, never run."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polyshard.core.errors import CheckpointError


def check_code(config: Mapping[str, Any], names: Mapping[str, Path], advice: str) -> None:
    """Check that the Python files that a model's configurations name, and the files that these import, are there.

    Args:
        config: fields of config.json.
        names: the files beside it; tokenizers' and processors' configurations among them are looked at, too.
        advice: what to do, for the error.

    Raises:
        CheckpointError: one is missing; transformers would look for it in vain.
    """
    named = [("config.json", config)]
    for name, path in names.items():
        if name.endswith("_config.json"):
            named.append((name, _fields(path)))
    for origin, fields in named:
        for reference in _references(fields.get("auto_map")):
            if "--" not in reference:  # else of another repository
                _check_module(reference.rpartition(".")[0], f"{origin}'s auto_map, {reference}", names, advice, set())


def _check_module(module: str, by: str, names: Mapping[str, Path], advice: str, seen: set[str]) -> None:
    file = f"{module.replace('.', '/')}.py"
    if file in seen:
        return
    seen.add(file)
    if file not in names:
        raise CheckpointError(f"{file} is missing: it is named by {by}, expected it beside config.json. {advice}")
    for imported in _relative_imports(names[file], module):
        _check_module(imported, file, names, advice, seen)


def _relative_imports(file: Path, module: str) -> Iterator[str]:
    """Modules beside a file that it imports as soon as it is imported; none if it cannot be parsed."""
    try:
        body = ast.parse(file.read_text()).body
    except (SyntaxError, ValueError, OSError):
        return
    package = module.split(".")[:-1]
    for node in body:  # at the top level: others may be alternatives
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                yield ".".join([*package, name])


def _references(auto_map: Any) -> Iterator[str]:
    values = auto_map.values() if isinstance(auto_map, Mapping) else auto_map or ()
    for value in values:
        yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))


def _fields(file: Path) -> Mapping[str, Any]:
    try:
        fields = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}
