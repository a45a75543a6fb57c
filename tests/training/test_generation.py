"""Ranks agree on a prefix for their keys, in a store that holds the keys of earlier starts."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

import polyshard as ps
from polyshard.adapters.torch.generation import agree_on_prefix


def start(store, size, late=()):
    """The prefixes of `size` ranks that start at once, but for those that are late."""

    def rank(number):
        time.sleep(0.3 * (number in late))
        return agree_on_prefix(store, number, size, 10)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def test_each_start_has_a_prefix_of_its_own():
    store = dist.HashStore()
    prefixes = [start(store, size) for size in (3, 1, 2, 3)]  # machines leave and come back
    assert all(len(set(found)) == 1 for found in prefixes)
    assert len({found[0] for found in prefixes}) == 4


@pytest.mark.parametrize("late", [{0}, {1, 2}], ids=["rank 0", "others"])
def test_names_of_an_earlier_start_deceive_nobody(late):
    store = dist.HashStore()
    before = start(store, 3)
    after = start(store, 3, late)
    assert len(set(after)) == 1
    assert after[0] != before[0]


def test_a_rank_that_does_not_come_is_named():
    store = dist.HashStore()
    start(store, 3)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(agree_on_prefix, store, rank, 3, 0.5) for rank in (0, 1)]
    with pytest.raises(ps.RankFailureError, match="waited in vain for rank 2: it has not called initialize") as failure:
        waiting[0].result()
    assert failure.value.ranks == (2,)
    with pytest.raises(ps.RankFailureError, match="waited in vain"):
        waiting[1].result()
