"""Folders of the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TOOLS = ROOT / "tools"
WORKERS = ROOT / "tests" / "support" / "workers"
