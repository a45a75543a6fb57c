"""The Python files that a model's configurations name in `auto_map`. They are parsed, never executed."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polyshard.core.errors import CheckpointError


def check_code(config: Mapping[str, Any], names: Mapping[str, Path], advice: str) -> None:
    """Check that the Python files named in a model's configurations exist, and the files that these import.

    Args:
        config: fields of config.json.
        names: the files beside it; configurations of tokenizers and processors among them are checked as well.
        advice: what to do, appended to the error.

    Raises:
        CheckpointError: a file is missing, so that transformers could not load the model.

    Examples:
        >>> check_code({"auto_map": {"AutoModel": "modeling.Model"}}, {"modeling.py": Path("modeling.py")}, "")
    """
    named = [("config.json", config)]
    for name, path in names.items():
        if name.endswith("_config.json"):
            named.append((name, _fields(path)))
    for origin, fields in named:
        for reference in _references(fields.get("auto_map")):
            if "--" not in reference:  # otherwise the file is in another repository
                _check_module(reference.rpartition(".")[0], f"{origin}'s auto_map, {reference}", names, advice, set())


def _check_module(module: str, by: str, names: Mapping[str, Path], advice: str, seen: set[str]) -> None:
    file = f"{module.replace('.', '/')}.py"
    if file in seen:
        return
    seen.add(file)
    if file not in names:
        raise CheckpointError(f"{file} is missing: {by} names it, expected it beside config.json. {advice}")
    for imported in _relative_imports(names[file], module):
        _check_module(imported, file, names, advice, seen)


def _relative_imports(file: Path, module: str) -> Iterator[str]:
    """Yield the sibling modules that a file imports at its top level; none if the file cannot be parsed."""
    try:
        body = ast.parse(file.read_text()).body
    except (SyntaxError, ValueError, OSError):
        return
    package = module.split(".")[:-1]
    for node in body:  # imports below the top level may be alternatives that never run
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
