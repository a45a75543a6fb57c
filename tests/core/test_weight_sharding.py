"""Slicing and gathering derive from one piece of data."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyshard import LayoutError, Segment, WeightLayout
from polyshard.core.weight_table import copy_into_shard


@st.composite
def layouts(draw):
    """A layout and a tensor-parallel size that it can be cut for."""
    size = draw(st.sampled_from([1, 2, 3, 4, 6]))
    segments = []
    for _ in range(draw(st.integers(1, 3))):
        unit = draw(st.integers(1, 4))
        kind = draw(st.sampled_from(["even", "replicated", "padded"]))
        if kind == "even":
            segments.append(Segment(size=unit * size * draw(st.integers(1, 3)), unit=unit))
        elif kind == "replicated":
            heads = draw(st.sampled_from([h for h in range(1, 13) if h % size == 0 or size % h == 0]))
            segments.append(Segment(size=heads * unit, unit=unit, replicate=True))
        else:
            segments.append(Segment(size=draw(st.integers(1, 40)), pad_multiple=draw(st.sampled_from([1, 8]))))
    dim = draw(st.integers(0, 1))
    shape = [5, 5]
    shape[dim] = sum(s.size for s in segments)
    return WeightLayout(shape=tuple(shape), dim=dim, segments=tuple(segments)), size


@given(layouts())
def test_assembling_all_shards_gives_the_full_tensor_back(case):
    layout, size = case
    full = torch.arange(1, 1 + layout.shape[0] * layout.shape[1], dtype=torch.float32).view(layout.shape)
    shards = [layout.slice(full, rank, size) for rank in range(size)]
    assert [tuple(s.shape) for s in shards] == [layout.local_shape(rank, size) for rank in range(size)]
    assert torch.equal(layout.assemble(shards), full)


@given(layouts())
def test_loading_segment_by_segment_equals_slicing(case):
    layout, size = case
    full = torch.randn(layout.shape)
    for rank in range(size):
        shard = torch.full(layout.local_shape(rank, size), float("nan"))
        for index, part in enumerate(layout.split(full)):
            if len(layout.segments) == 1:
                copy_into_shard(shard, layout, 1, 0, part, rank, size)
            else:
                copy_into_shard(shard, layout, len(layout.segments), index, part, rank, size)
        assert torch.equal(shard, layout.slice(full, rank, size))


def test_fused_segments_are_each_cut_on_their_own():
    layout = WeightLayout(shape=(8, 1), dim=0, segments=(Segment(size=4), Segment(size=4)))
    full = torch.arange(8.0).view(8, 1)
    assert layout.slice(full, 1, 2).flatten().tolist() == [2.0, 3.0, 6.0, 7.0]


def test_neighbouring_ranks_share_a_key_value_head():
    layout = WeightLayout(shape=(4, 1), dim=0, segments=(Segment(size=4, unit=2, replicate=True),))
    full = torch.arange(4.0).view(4, 1)
    assert [layout.slice(full, r, 4).flatten().tolist() for r in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert layout.has_replicas(4)
    assert not layout.has_replicas(2)


def test_a_padded_vocabulary_has_zeros_at_its_end():
    layout = WeightLayout(shape=(5, 1), dim=0, segments=(Segment(size=5, pad_multiple=1),))
    assert layout.slice(torch.ones(5, 1), 1, 2).flatten().tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("segment", "size", "message"),
    [
        (Segment(size=9, name="q_proj"), 2, "q_proj: 9 cannot be divided by tensor-parallel size 2"),
        (Segment(size=192, unit=64), 2, "3 blocks of 64 cannot be divided by tensor-parallel size 2"),
        (Segment(size=192, unit=64, replicate=True), 4, "nor can 4 ranks share 3 evenly"),
    ],
)
def test_what_cannot_be_divided_is_refused(segment, size, message):
    with pytest.raises(LayoutError, match=message):
        segment.local_range(0, size)


def test_contradictory_layouts_are_refused():
    with pytest.raises(LayoutError, match="sum of the segments is wrong: got 3, expected 4"):
        WeightLayout(shape=(4, 4), dim=0, segments=(Segment(size=3),))
    with pytest.raises(LayoutError, match="sharded dimension is invalid: got 2"):
        WeightLayout(shape=(4, 4), dim=2)
    with pytest.raises(LayoutError, match=r"full tensor has the wrong shape: got \(4, 3\), expected \(4, 4\)"):
        WeightLayout(shape=(4, 4), dim=0).slice(torch.ones(4, 3), 0, 2)
