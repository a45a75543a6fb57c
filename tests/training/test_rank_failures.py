"""When a rank dies, freezes or goes astray, the others end in time with an error that names it."""

import os
import signal
import time

import pytest
import torch

import polyshard as ps
from polyshard.adapters.torch.failure import RankMonitor
from polyshard.testing import run_ranks

TIMEOUT = 8.0  # seconds given to initialize


def wait_for_each_other(how, culprit):
    context = ps.initialize("torch", tensor=2, timeout=TIMEOUT)
    layer = ps.row_parallel(8, 8, context)
    x = torch.randn(4, 8 // 2, requires_grad=True)
    layer(x).sum().backward()  # all is well so far
    if context.rank == culprit:
        if how == "dies":
            os._exit(3)
        if how == "freezes":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "stays away":
            time.sleep(TIMEOUT + 4)
            return None
        if how == "raises":
            with pytest.raises(ValueError, match="a bad batch"):
                end_with_an_error(context)
            return None
    started = time.monotonic()
    try:
        layer(x)
    except ps.RankFailureError as error:
        return time.monotonic() - started, str(error), error.ranks
    return None


def end_with_an_error(context):
    try:
        raise ValueError("a bad batch")
    finally:
        ps.shutdown(context)


def test_a_rank_that_dies_is_named():
    results = run_ranks(wait_for_each_other, 2, "dies", 1, silent=(1,), timeout=60)
    seconds, message, ranks = results[0]
    assert seconds < TIMEOUT
    assert ranks == (1,)
    assert "rank 1 crashed, hung, or cannot be reached (last heartbeat at " in message
    assert "tensor all_reduce" in message


def test_the_death_of_the_stores_keeper_is_told():
    results = run_ranks(wait_for_each_other, 2, "dies", 0, silent=(0,), timeout=60, agent=False)
    seconds, message, _ = results[1]
    assert seconds < TIMEOUT
    assert "the process that keeps the store" in message


def test_a_rank_that_freezes_is_named_within_the_timeout():
    results = run_ranks(wait_for_each_other, 2, "freezes", 1, silent=(1,), timeout=60)
    seconds, message, ranks = results[0]
    assert seconds < TIMEOUT
    assert ranks == (1,)
    assert "rank 1 crashed, hung, or cannot be reached" in message


def test_a_rank_that_lives_but_does_not_come_is_named():
    results = run_ranks(wait_for_each_other, 2, "stays away", 1, timeout=60)
    seconds, message, ranks = results[0]
    assert seconds < TIMEOUT
    assert ranks == (1,)
    assert "rank 1 is alive but has entered 1 collectives on this axis, this rank 2" in message


def test_an_error_is_not_hidden_by_shutdown_in_a_finally_block_and_the_others_learn_it():
    results = run_ranks(wait_for_each_other, 2, "raises", 1, timeout=60)
    seconds, message, ranks = results[0]
    assert seconds < TIMEOUT
    assert ranks == (1,)
    assert "rank 1 raised ValueError: a bad batch" in message


def test_an_error_that_a_rank_caught_is_told_until_a_collective_of_that_axis_succeeds():
    store = torch.distributed.HashStore()
    waits, catches = (RankMonitor(store, rank, 2) for rank in range(2))
    told = []
    try:
        with pytest.raises(ValueError, match="a bad batch"), catches.guard("pipeline schedule"):
            raise ValueError("a bad batch")
        for later in ("world barrier", "pipeline schedule"):
            with catches.guard(later):
                pass
            with pytest.raises(ps.RankFailureError) as caught, waits.guard("pipeline schedule"):
                raise RuntimeError("Application timeout caused pair closure")
            told.append(str(caught.value))
    finally:
        for monitor in (waits, catches):
            monitor.stop()
    assert "rank 1 raised ValueError: a bad batch (last heartbeat at " in told[0]
    assert "in pipeline schedule" in told[0]
    assert "all ranks are alive" in told[1]


def test_a_rank_of_another_pipeline_stage_is_not_blamed_for_its_fewer_collectives():
    """Ranks 0 and 1 are replicas of one stage, rank 2 is in another one, which has none of these collectives."""
    store = torch.distributed.HashStore()
    monitors = [RankMonitor(store, rank, 3) for rank in range(3)]
    monitors[0].peers["data"] = (0, 1)
    try:
        with pytest.raises(ps.RankFailureError) as caught, monitors[0].guard("data all_reduce"):
            raise torch.distributed.DistError("Timed out")
    finally:
        for monitor in monitors:
            monitor.stop()
    assert caught.value.ranks == (1,)


def initialise_again_with_another_size():
    for tensor in (1, 2, 1):
        context = ps.initialize("torch", tensor=tensor, timeout=30 + tensor)
        assert context.get_tensor_parallel_world_size() == tensor
        assert context.get_data_parallel_world_size() == 2 // tensor
        total = context.axis("tensor" if tensor == 2 else "data").collectives.all_reduce(torch.ones(3))
        assert total.tolist() == [2.0, 2.0, 2.0]
        ps.shutdown(context)
    return "done"


def test_initialise_shut_down_and_initialise_again():
    assert run_ranks(initialise_again_with_another_size, 2) == ["done", "done"]


def raise_on(culprit):
    context = ps.initialize("torch", tensor=2, timeout=TIMEOUT)
    if context.rank == culprit:
        raise KeyError("a bug of the user's")
    ps.row_parallel(8, 8, context)(torch.ones(1, 4))


def test_run_ranks_shows_each_ranks_traceback():
    with pytest.raises(AssertionError, match=r"(?s)rank 0 raised.*rank 1.*rank 1 raised.*a bug of the user's"):
        run_ranks(raise_on, 2, 1, timeout=60)
