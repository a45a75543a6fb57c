"""Write the pages and tables of the documentation that are made from the code.

python -m tools.pages            writes them
python -m tools.pages --check    exit status 1 if one is not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from tools.pages.sources import PAGES, TABLES

DOCS = Path(__file__).resolve().parents[2] / "docs"
END = "<!-- end -->"


def start_of(name: str) -> str:
    return f"<!-- made by python -m tools.pages: {name} -->\n"


def with_tables(text: str) -> str:
    """The text of a page with each of its tables replaced."""
    for name, make in TABLES.items():
        if start_of(name) in text:
            before, rest = text.split(start_of(name))
            text = before + start_of(name) + make() + END + rest.split(END, 1)[1]
    return text


def pages() -> dict[Path, str]:
    made = {DOCS / name: make() for name, make in PAGES.items()}
    for path in sorted(DOCS.rglob("*.md")):
        if path not in made:
            text = path.read_text()
            if "<!-- made by python -m tools.pages: " in text:
                made[path] = with_tables(text)
    return made


def main() -> None:
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(DOCS.parent)} is not up to date: run python -m tools.pages")
        sys.exit(bool(stale))
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    print(f"{len(stale)} pages changed")


if __name__ == "__main__":
    main()
