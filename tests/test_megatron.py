"""What is peculiar to Megatron-Core."""

import inspect

import pytest
import torch

import polyshard as ps
from polyshard.testing import run_ranks


def test_the_contract_names_what_is_relied_on():
    from polyshard.adapters.megatron import compat

    expected = {
        compat.ColumnParallelLinear: ("config", "init_method", "bias", "gather_output", "tp_group"),
        compat.RowParallelLinear: ("config", "init_method", "bias", "input_is_parallel", "skip_bias_add", "tp_group"),
        compat.VocabParallelEmbedding: ("init_method", "reduce_scatter_embeddings", "config", "tp_group"),
        compat.DistributedDataParallel: ("config", "ddp_config", "module", "pg_collection"),
    }
    for cls, names in expected.items():
        known = inspect.signature(cls.__init__).parameters
        assert not [n for n in names if n not in known], f"Megatron's {cls.__name__} changed: mend compat.py"
    known = inspect.signature(compat.get_megatron_optimizer).parameters
    assert {"use_gloo_process_groups", "pg_collection"} <= set(known)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shim does nothing where there is CUDA")
def test_the_shims_are_still_needed():
    """Without them: an error for want of CUDA. When this fails, drop the shim that it names."""
    messages = run_ranks(without_shims, 2)[0]
    assert "CUDA" in messages["current_device_as_cpu"], messages
    assert "CUDA" in messages["cuda_as_cpu"], messages


def without_shims():
    import contextlib

    from polyshard.adapters.megatron import compat

    messages, original = {}, torch.cuda.current_device
    context = ps.initialize("megatron", tensor=2, sequence_parallel=True, timeout=30)
    layer = ps.column_parallel(8, 8, context)
    shimmed, torch.cuda.current_device = torch.cuda.current_device, original
    try:
        layer(torch.ones(4, 8))
    except (AssertionError, RuntimeError) as error:
        messages["current_device_as_cpu"] = str(error)
    torch.cuda.current_device = shimmed
    ps.shutdown(context)

    context = ps.initialize("megatron", tensor=2, timeout=30)
    compat.cuda_as_cpu = contextlib.nullcontext
    try:
        ps.load_adapter("megatron").engine(ps.column_parallel(8, 8, context), ps.AdamW(), context)
    except (AssertionError, RuntimeError) as error:
        messages["cuda_as_cpu"] = str(error)
    ps.shutdown(context)
    return messages


def nothing_is_left_behind():
    from megatron.core import parallel_state

    original = torch.cuda.current_device
    for sequence_parallel in (True, False):
        context = ps.initialize("megatron", tensor=2, sequence_parallel=sequence_parallel, timeout=30)
        logits = ps.column_parallel(8, 10, context)(torch.ones(4 // (2 if sequence_parallel else 1), 8))
        ps.vocab_parallel_cross_entropy(logits, torch.tensor([1, 2, 3, 9]), context).backward()
        assert parallel_state._TENSOR_MODEL_PARALLEL_GROUP is None
        ps.shutdown(context)
        assert torch.cuda.current_device is original


def test_no_global_is_left_behind():
    run_ranks(nothing_is_left_behind, 2)


def test_another_optimizer_is_refused():
    context = ps.initialize("megatron")
    model = ps.column_parallel(4, 4, context)
    with pytest.raises(ps.AdapterError, match=r"Megatron makes its own optimizer: pass polyshard.AdamW"):
        ps.load_adapter("megatron").engine(model, lambda named: None, context)
    ps.shutdown(context)
