"""The packages of polyshard, top to bottom, as the import contract orders them."""

import importlib
import tomllib
from pathlib import Path

from tools.pages.tables import markdown

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def layers() -> list[list[str]]:
    contracts = tomllib.loads(PROJECT.read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (c for c in contracts if c.get("containers") == ["polyshard"])
    return [[name.strip() for name in line.split("|")] for line in contract["layers"]]


def table() -> str:
    rows = []
    for level, names in enumerate(layers(), start=1):
        for name in names:
            module = importlib.import_module(f"polyshard.{name}")
            summary = (module.__doc__ or "").strip().partition("\n\n")[0].replace("\n", " ")
            if not hasattr(module, "__path__"):  # a module, not a package
                rows.append((level, f"`{name}`", summary, 1))
                continue
            modules = [path for path in Path(module.__file__ or "").parent.rglob("*.py") if path.name != "__init__.py"]
            rows.append((level, f"`{name}`", summary, len(modules)))
    return markdown(("layer", "package", "what it holds", "modules"), rows)
