"""Write the table of capabilities into docs/adapters.md.

python tools/capabilities.py
"""

from pathlib import Path

import polyshard as ps
from polyshard.core.capabilities import FEATURES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adapters.md"
START, END = "<!-- capabilities: made by tools/capabilities.py -->\n", "<!-- end -->"


def table() -> str:
    names = ps.adapter_names()
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for feature, meaning in FEATURES.items():
        answers = [ps.load_adapter(name).capabilities[feature] for name in names]
        cells = ["yes" if a.available else f"no ({a.whose}): {a.reason}" for a in answers]
        lines.append(f"| {meaning} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    before, rest = PAGE.read_text().split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page())
