"""Write the tables of capabilities and of supported versions into docs/adapters.md.

python tools/capabilities.py
"""

from pathlib import Path

import polyshard as ps
from polyshard.core.capabilities import FEATURES
from polyshard.transformers.replaced.requirement import TRANSFORMERS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adapters.md"
VERSIONS = "<!-- versions: made by tools/capabilities.py -->\n"
START, END = "<!-- capabilities: made by tools/capabilities.py -->\n", "<!-- end -->"


def table() -> str:
    names = ps.adapter_names()
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for feature, meaning in FEATURES.items():
        answers = [ps.load_adapter(name).capabilities[feature] for name in names]
        cells = ["yes" if a.available else f"no ({a.whose}): {a.reason}" for a in answers]
        lines.append(f"| {meaning} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def versions() -> str:
    lines = ["| library | supported | run with | installed by |", "|---|---|---|---|"]
    for needed in (*(ps.load_adapter(name).requirement for name in ps.adapter_names()), TRANSFORMERS):
        lines.append(f"| {needed.title} | `{needed.supported}` | {', '.join(needed.tested)} | `{needed.install}` |")
    return "\n".join(lines) + "\n"


def page() -> str:
    text = PAGE.read_text()
    for start, made in ((START, table()), (VERSIONS, versions())):
        before, rest = text.split(start)
        text = before + start + made + END + rest.split(END, 1)[1]
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
