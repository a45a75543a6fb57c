"""Communication overlaps with the backward pass, by the libraries' own options, and results stay equal."""

import pytest
import torch
from support.models.tiny import save_tiny
from support.workers.overlap import order_of_gathers, order_of_reductions, overlapped_steps
from torch import nn

import polyshard as ps
from polyshard.testing import run_ranks


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("overlap") / "model", "llama", num_hidden_layers=3)


FSDP = {"data_parallel": "fsdp"}
OPTIONS = {
    "torch": [
        ({}, {"ddp_options": {"bucket_cap_mb": 0.02, "static_graph": True, "gradient_as_bucket_view": False}}),
        (FSDP, FSDP | {"fsdp_options": {"reshard_after_forward": False}}),
        (FSDP, FSDP | {"fsdp_options": {"forward_prefetch": 2, "backward_prefetch": 1}}),
    ],
    "megatron": [
        (
            {"zero_stage": stage},
            {"zero_stage": stage, "ddp_options": {"overlap_grad_reduce": True, "bucket_size": 9000}},
        )
        for stage in (0, 1)
    ],
    "deepspeed": [
        (
            {"zero_stage": 2},
            {"zero_stage": 2, "config": {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 9000}}},
        )
    ],
    "fairscale": [
        ({"zero_stage": 1}, {"zero_stage": 1, "ddp_options": {"bucket_cap_mb": 0.02}}),
        ({"zero_stage": 2}, {"zero_stage": 2, "ddp_options": {"reduce_buffer_size": 0}}),
    ],
}


@pytest.mark.parametrize("adapter", OPTIONS)
def test_weights_are_those_without_overlap(directory, adapter):
    for outcomes in run_ranks(overlapped_steps, 2, directory, adapter, OPTIONS[adapter]):
        for plain, overlapped in outcomes:
            for name, weight in plain.items():
                torch.testing.assert_close(overlapped[name], weight, rtol=0, atol=2e-6, msg=name)


def test_gradients_with_masters_are_sent_while_the_backward_pass_runs(directory):
    for events in run_ranks(order_of_reductions, 2, directory):
        assert events[-1] == "message"
        assert "message" in events[: events.index("block 0")], events
        assert "wait" not in events


def test_fsdp_gathers_the_next_blocks_before_a_block_runs(directory):
    own = run_ranks(order_of_gathers, 2, directory, {})[0]
    early = run_ranks(order_of_gathers, 2, directory, {"forward_prefetch": 1})[0]
    # The root is gathered first.
    assert own == ["gather", "gather", "block 0", "gather", "block 1", "gather", "block 2"]
    assert early == ["gather", "gather", "gather", "block 0", "gather", "block 1", "block 2"]


def refused(adapter, dtype=torch.float32, **options):
    context = ps.initialize("torch")
    with pytest.raises(ps.ConfigurationError) as error:
        ps.load_adapter(adapter).engine(nn.Linear(2, 2, dtype=dtype), ps.AdamW(), context, **options)
    return str(error.value)


def test_options_without_effect_are_refused_with_the_reason():
    assert "unexpected names: got bucket_size, expected some of" in refused("torch", ddp_options={"bucket_size": 1})
    assert "got process_group" in refused("torch", ddp_options={"process_group": None})
    assert "data_parallel='ddp'" in refused("torch", fsdp_options={"reshard_after_forward": False})
    assert "without effect: got static_graph" in refused("torch", torch.bfloat16, ddp_options={"static_graph": True})
    assert "forward_prefetch is invalid: got -1" in refused(
        "torch", data_parallel="fsdp", fsdp_options={"forward_prefetch": -1}
    )
    assert "got reduce_fp16" in refused("fairscale", ddp_options={"reduce_fp16": True})
    assert "bucket_size has no effect" in refused("megatron", ddp_options={"bucket_size": 1000})
    assert "would be those before the step" in refused("megatron", ddp_options={"overlap_param_gather": True})
    assert "got bucket_cap_mb='50', expected a number of 0" in refused("torch", ddp_options={"bucket_cap_mb": "50"})
    assert "got static_graph='yes', expected no text" in refused("torch", ddp_options={"static_graph": "yes"})
    assert "got list, expected a mapping" in refused("fairscale", ddp_options=["bucket_cap_mb"])
    assert "got 1, expected 2" in refused("deepspeed", zero_stage=2, config={"zero_optimization": {"stage": 1}})
