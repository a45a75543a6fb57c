"""What is peculiar to FairScale."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import polyshard as ps
from polyshard.adapters.fairscale.zero_elements import zero_elements
from polyshard.core.zero_elements import ZeroQuestion
from polyshard.testing import run_ranks

SIZES = (12, 40, 24, 8, 60, 4, 30)  # elements of the parameters; uneven shares
BUFFER = 50


def gradients_of_sharded_ddp():
    """On a one-rank group, does the owner keep its gradient? On two ranks, the elements that a rank owns and holds.

    ShardedDDP is as FairScale ships it.
    """
    import torch.distributed as dist
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.optim.oss import OSS

    dist.init_process_group("gloo")
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    model = nn.Linear(2, 2)
    wrapped = ShardedDataParallel(model, OSS(model.parameters(), lr=0.1, group=group), process_group=group)
    wrapped(torch.ones(1, 2)).sum().backward()
    kept = model.weight.grad is not None

    parameters = [nn.Parameter(torch.randn(size)) for size in SIZES]
    optimizer = OSS(parameters, lr=0.1)
    wrapped = ShardedDataParallel(Sum(parameters), optimizer, reduce_buffer_size=BUFFER)
    wrapped().backward()
    owned = sum(p.numel() for group in optimizer.partition_parameters()[dist.get_rank()] for p in group["params"])
    storages = {p.grad.untyped_storage() for p in parameters if p.grad is not None}
    held = sum(storage.nbytes() // 4 for storage in {storage.data_ptr(): storage for storage in storages}.values())
    dist.barrier()
    dist.destroy_process_group()
    return kept, owned, held


class Sum(nn.Module):
    def __init__(self, parameters):
        super().__init__()
        self.each = nn.ParameterList(parameters)

    def forward(self):
        return sum(parameter.sum() for parameter in self.each)


@pytest.fixture(scope="module")
def sharded():
    """What `gradients_of_sharded_ddp` finds on two ranks."""
    return run_ranks(gradients_of_sharded_ddp, 2)


def test_the_correction_of_sharded_ddp_is_still_needed(sharded):
    assert [kept for kept, _, _ in sharded] == [True, False], (
        "FairScale's ShardedDDP keeps its gradients by itself: drop compat.sharded_data_parallel"
    )


def test_plans_count_what_the_fullest_rank_owns_and_holds(sharded):
    run = ZeroQuestion(stage=2, dense=SIZES, expert=(), frozen=0, replicas=2, holders=1, micro_batches=1)
    elements = zero_elements(run, BUFFER)
    assert (elements.owned, elements.gradients) == tuple(map(max, list(zip(*sharded))[1:]))
    assert elements.owned > sum(SIZES) / 2
    assert sum(SIZES) / 2 < elements.gradients < sum(SIZES)  # some gradients are freed where they are not owned
    # A rank owns at least the largest parameter, however many ranks there are.
    assert zero_elements(replace(run, replicas=100), BUFFER).owned == max(SIZES)


def one_group_per_process():
    from fairscale.nn.model_parallel import initialize as state

    first = ps.initialize("fairscale", tensor=2, timeout=30)
    assert state._MODEL_PARALLEL_GROUP is first.get_tensor_parallel_group()
    second = ps.load_adapter("torch").initialize(ps.ParallelLayout(data=2), timeout=30)
    with pytest.raises(ps.AdapterError, match="FairScale has one tensor-parallel group for the whole process"):
        ps.load_adapter("fairscale").adopt(second)
    ps.shutdown(first)
    assert state._MODEL_PARALLEL_GROUP is None


def test_a_second_group_is_refused_and_the_global_is_given_back():
    run_ranks(one_group_per_process, 2)


def test_sequence_parallel_is_refused_with_the_reason():
    with pytest.raises(ps.AdapterError, match=r"Adapter 'fairscale' does not support sequence parallel .*\(never\)"):
        ps.load_adapter("fairscale").initialize(ps.ParallelLayout(sequence_parallel=True))
