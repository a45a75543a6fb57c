"""The supported versions of PEFT."""

from __future__ import annotations

from polyshard.core.requirement import Requirement

PEFT = Requirement(
    title="PEFT",
    module="peft",
    distributions=("peft",),
    tested=("0.21.2",),
    supported=">=0.21,<0.22",
    install="pip install 'polyshard[lora]'",
)
