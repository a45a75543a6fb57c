"""The requirement on Ray."""

from __future__ import annotations

from polyshard.core.requirement import Requirement

REQUIREMENT = Requirement(
    title="Ray",
    module="ray",
    distributions=("ray",),
    tested=("2.60.0",),
    supported=">=2.60,<3",
    install="pip install 'polyshard[ray]'",
)
