"""What is peculiar to FairScale."""

import pytest
import torch
from torch import nn

import polyshard as ps
from polyshard.testing import run_ranks


def gradient_kept_by_sharded_ddp():
    """On a one-rank group, ShardedDDP as FairScale ships it: does the owner keep its gradient?"""
    import torch.distributed as dist
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.optim.oss import OSS

    dist.init_process_group("gloo")
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    model = nn.Linear(2, 2)
    wrapped = ShardedDataParallel(model, OSS(model.parameters(), lr=0.1, group=group), process_group=group)
    wrapped(torch.ones(1, 2)).sum().backward()
    kept = model.weight.grad is not None
    dist.barrier()
    dist.destroy_process_group()
    return kept


def test_the_correction_of_sharded_ddp_is_still_needed():
    assert run_ranks(gradient_kept_by_sharded_ddp, 2) == [True, False], (
        "FairScale's ShardedDDP keeps its gradients by itself: drop compat.sharded_data_parallel"
    )


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
