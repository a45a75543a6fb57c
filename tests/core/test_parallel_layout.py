"""Sizes of the parallel axes, and where ranks stand."""

import pytest

import polyshard as ps
from polyshard.layers.pipeline import even_stages


def test_data_parallel_takes_the_ranks_that_are_left():
    layout = ps.ParallelLayout.for_world(24, tensor=2, pipeline=3)
    assert (layout.tensor, layout.pipeline, layout.data, layout.world_size) == (2, 3, 4, 24)


def test_a_world_that_does_not_fit_shows_the_arithmetic():
    with pytest.raises(ps.LayoutError, match=r"got 6, expected a multiple of tensor 4 x pipeline 1 x context 1 = 4"):
        ps.ParallelLayout.for_world(6, tensor=4)
    arithmetic = r"tensor 2 x pipeline 1 x context 1 x data 3 = 6"
    with pytest.raises(ps.LayoutError, match=rf"got 4 ranks, expected {arithmetic}\. Start 6"):
        ps.ParallelLayout(tensor=2, data=3).validate(4)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_a_size_is_a_positive_integer(size):
    with pytest.raises(ps.LayoutError, match="tensor-parallel size is invalid: got .*, expected a positive integer"):
        ps.ParallelLayout(tensor=size)


def test_sequence_parallel_is_a_bool():
    with pytest.raises(ps.LayoutError, match="sequence_parallel is invalid: got 'yes'"):
        ps.ParallelLayout(sequence_parallel="yes")


def test_expert_ranks_divide_data_ranks():
    with pytest.raises(ps.LayoutError, match="expert-parallel size is invalid: got 3, .*data-parallel size 4"):
        ps.ParallelLayout(data=4, expert=3)


def test_tensor_parallel_ranks_are_neighbours():
    layout = ps.ParallelLayout(tensor=2, context=2, data=2, pipeline=2)
    assert layout.groups("tensor")[:2] == [(0, 1), (2, 3)]
    assert layout.groups("context")[0] == (0, 2)
    assert layout.groups("data")[0] == (0, 4)
    assert layout.groups("pipeline")[0] == (0, 8)


def test_the_groups_of_every_axis_part_the_world():
    layout = ps.ParallelLayout(tensor=3, data=4, expert=2, pipeline=2)
    for axis in ("tensor", "pipeline", "data", "context", "expert"):
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(24))
        assert {len(group) for group in groups} == {getattr(layout, axis)}


def test_one_process_alone_is_a_context():
    context = ps.initialize("torch")
    assert isinstance(context, ps.ParallelContext)
    for axis in ("tensor", "pipeline", "data", "context", "expert"):
        assert getattr(context, f"get_{axis}_parallel_rank")() == 0
        assert getattr(context, f"get_{axis}_parallel_world_size")() == 1
        assert getattr(context, f"get_{axis}_parallel_group")() is None


@pytest.mark.parametrize("layers", [1, 2, 5, 12])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_pipeline_stages_hold_each_layer_once(layers, stages):
    if layers < stages:
        pytest.skip("fewer layers than stages")
    runs = [range(*even_stages(layers, rank, stages)) for rank in range(stages)]
    assert [layer for run in runs for layer in run] == list(range(layers))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
