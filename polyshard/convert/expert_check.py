"""Checks of experts by their number: each block has all of its experts, stored one by one or stacked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyshard.convert.accounting import some
from polyshard.convert.format import Foreign
from polyshard.core.errors import CheckpointError

_PART = re.compile(r"(.+\.experts)\.(\d+)\.([^.]+)")
_STACKED = re.compile(r"\.experts\.(gate_up_proj|down_proj)\w*$")
_ALL = re.compile(r"\.experts\.(gate_up_proj|down_proj)$|\.block_sparse_moe\.(input|output)_linear\.weight$")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_experts(foreign: Foreign, where: Path) -> None:
    """Check that every block of experts has all of its experts, with equal parts, and stores them once.

    Args:
        foreign: the checkpoint.
        where: its path, for errors.

    Raises:
        CheckpointError: an expert or a part of one is missing, there are more experts than the configuration states, a
            stacked tensor has another number of experts, or a block stores its experts both one by one and stacked.
    """
    blocks: dict[str, dict[int, set[str]]] = {}
    for match in filter(None, map(_PART.match, foreign.tensors)):
        blocks.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    stacked = {name.rpartition(".")[0]: name for name in foreign.tensors if _STACKED.search(name)}
    field, count = _stated(foreign.config or {})
    missing: list[str] = []
    for block, experts in blocks.items():
        if block in stacked:
            raise CheckpointError(
                f"{where} stores experts twice: got {stacked[block]} beside {block}.{min(experts)}, expected one form. "
                "Remove one of them."
            )
        last = max(experts)
        if count is not None and last >= count:
            raise CheckpointError(
                f"{where} holds unexpected experts: got {block}.{last}, expected experts 0 to {count - 1} by the "
                f"configuration's {field}={count}. Correct {field}, or the checkpoint."
            )
        parts = set.union(*experts.values())
        missing += [
            f"{block}.{number}.{part}"
            for number in range(last + 1 if count is None else count)
            for part in parts - experts.get(number, set())
        ]
    _check_stacked(foreign, where, field, count)
    if missing:
        stated = "" if count is None else f", by the configuration's {field}={count}"
        raise CheckpointError(
            f"{where} is incomplete: {len(missing)} parts of experts are missing: {some(missing)}{stated}. Copy the "
            "whole checkpoint."
        )


def _check_stacked(foreign: Foreign, where: Path, field: str, count: int | None) -> None:
    held = {name: tensor.shape[0] for name, tensor in foreign.tensors.items() if _ALL.search(name)}
    for name, number in held.items():
        if count is not None and number != count:
            raise CheckpointError(
                f"{where} has the wrong number of experts: got {number} in {name}, expected {count} by the "
                f"configuration's {field}={count}. Copy the whole checkpoint, or correct {field}."
            )
    pairs = (("gate_up_proj", "down_proj"), ("input_linear.weight", "output_linear.weight"))
    for name in held:
        for first, second in (*pairs, *(pair[::-1] for pair in pairs)):
            other = name.removesuffix(first) + second
            if name.endswith(f".{first}") and other not in foreign.tensors:
                raise CheckpointError(
                    f"{where} is incomplete: {other} is missing beside {name}. Copy the whole checkpoint."
                )


def _stated(config: Mapping[str, Any]) -> tuple[str, int | None]:
    """Return the field that states the number of experts, and the number; None if the configuration has several."""
    parts = {name for name, value in config.items() if name.endswith("_config") and isinstance(value, Mapping)}
    if parts - {"quantization_config"}:  # a model of several parts, each with its own number
        return "", None
    held = {name: value for name in _COUNTS if isinstance(value := config.get(name), int) and value > 0}
    return next(iter(held.items())) if len(set(held.values())) == 1 else ("", None)
