"""Any run of any rank's shard is made of rectangles of stored tensors that are disjoint and cover all."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyshard.core.weight_sharding import Segment, WeightLayout
from polyshard.core.weight_table import WeightEntry, checkpoint_names, stored_parts
from polyshard.weights.regions import regions

LAYOUTS = {
    "whole": WeightLayout(shape=(12, 5)),
    "vector": WeightLayout(shape=(13,)),
    "rows": WeightLayout(shape=(16, 5), dim=0),
    "columns": WeightLayout(shape=(6, 8), dim=1),
    "vocabulary": WeightLayout(shape=(13, 3), dim=0, segments=(Segment(size=13, pad_multiple=1),)),
    "fused": WeightLayout(shape=(16, 3), dim=0, segments=(Segment(size=8, name="gate"), Segment(size=8, name="up"))),
    "stored as one": WeightLayout(shape=(16, 3), dim=0, segments=(Segment(size=8), Segment(size=8))),
    "shared KV heads": WeightLayout(
        shape=(16, 3),
        dim=0,
        segments=(
            Segment(size=8, unit=2, name="q"),
            Segment(size=4, unit=2, name="k", replicate=True),
            Segment(size=4, unit=2, name="v", replicate=True),
        ),
    ),
    "fused bias": WeightLayout(shape=(8,), dim=0, segments=(Segment(size=4, name="a"), Segment(size=4, name="b"))),
    "three dimensions": WeightLayout(shape=(4, 3, 4), dim=2),
}


def entry_of(layout):
    return WeightEntry(
        parameter="m.weight", name="m.weight", layout=layout, checkpoint_names=checkpoint_names("m.weight", layout)
    )


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=40, deadline=None)
@given(size=st.sampled_from([1, 2, 4]), cuts=st.lists(st.floats(0, 1), max_size=4))
def test_runs_rebuild_the_stored_tensors(name, size, cuts):
    layout = LAYOUTS[name]
    entry = entry_of(layout)
    full = torch.arange(1, math.prod(layout.shape) + 1, dtype=torch.float32).view(layout.shape)
    want = dict(zip(entry.checkpoint_names, stored_parts(layout, len(entry.checkpoint_names), full)))
    written = {stored: torch.zeros_like(tensor) for stored, tensor in want.items()}
    times = {stored: torch.zeros_like(tensor) for stored, tensor in want.items()}
    for rank in range(size):
        shard = layout.slice(full, rank, size).contiguous().flatten()
        edges = sorted({0, len(shard), *(int(cut * len(shard)) for cut in cuts)})
        for start, stop in itertools.pairwise(edges):
            for region in regions(entry, rank, size, start, stop):
                assert region.shape == tuple(want[region.name].shape)
                if region.first:
                    where = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes))
                    written[region.name][where] = region.view(shard[start:stop], start)
                    times[region.name][where] += 1
    for stored, tensor in want.items():
        assert torch.equal(written[stored], tensor)
        assert bool((times[stored] == 1).all()), "each element is written by exactly one rank"


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_rank_reads_is_its_shard(name, size):
    layout = LAYOUTS[name]
    entry = entry_of(layout)
    full = torch.randn(layout.shape)
    stored = dict(zip(entry.checkpoint_names, stored_parts(layout, len(entry.checkpoint_names), full)))
    for rank in range(size):
        want = layout.slice(full, rank, size)
        values = torch.zeros(want.numel())
        for region in regions(entry, rank, size):
            where = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes))
            region.view(values).copy_(stored[region.name][where])
        assert torch.equal(values.view(want.shape), want)
