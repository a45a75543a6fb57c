"""The supported versions of transformers."""

from __future__ import annotations

from polyshard.core.requirement import Requirement

TRANSFORMERS = Requirement(
    title="transformers",
    module="transformers",
    distributions=("transformers",),
    tested=("5.17.0", "5.19.0", "5.24.0"),
    supported=">=5.17,<5.25",
    install="pip install transformers",
)
