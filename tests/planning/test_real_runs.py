"""Planned bytes are those of real runs of the torch engines on two and four ranks."""

import functools
from collections import Counter

import pytest
from support.planned_cases import ON_FOUR, ON_TWO, memory, one_name, payload, planned
from support.workers.planned import measured

from polyshard.testing import run_ranks

CASES = [(2, name) for name, case in ON_TWO.items() if case["traffic"]] + [(4, name) for name in ON_FOUR]


@functools.cache
def runs(ranks):
    """The figures of each rank, by case; all cases run in one launch."""
    cases = {2: ON_TWO, 4: ON_FOUR}[ranks]
    return dict(zip(cases, zip(*run_ranks(measured, ranks, list(cases.values()), timeout=280))))


def chosen(ranks, name):
    return {2: ON_TWO, 4: ON_FOUR}[ranks][name]


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_collectives_carry_the_planned_bytes(ranks, name):
    """On average over the ranks: experts have different loads, and a plan takes them to be equal."""
    total = Counter()
    for rank in runs(ranks)[name]:
        total.update(one_name(chosen(ranks, name), ranks, rank["traffic"]))
    expected = payload(chosen(ranks, name), ranks)
    assert total == {key: ranks * nbytes for key, nbytes in expected.items()}


@pytest.mark.parametrize("name", [name for name, case in ON_TWO.items() if not case["options"]])
def test_parameters_have_the_planned_bytes(name):
    strategy, trace = planned(ON_TWO[name], 2)
    expected = strategy.precision.parameters.itemsize * trace.sizes.trainable
    assert runs(2)[name][0]["parameters"] == expected


# benchmarks/plan.py asks the operating system for other layouts.
@pytest.mark.parametrize("name", [name for name, case in ON_TWO.items() if case["memory"]])
def test_peak_memory_is_planned_within_ten_percent_and_is_not_more(name):
    peak = max(rank["peak"] for rank in runs(2)[name])
    assert 0.99 * peak <= memory(ON_TWO[name], 2).total <= 1.10 * peak
