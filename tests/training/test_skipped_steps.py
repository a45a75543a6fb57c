"""Steps with infinite gradients, discarded gradients, evaluation before a step, and the model in its engine's place."""

import pytest
import torch
from support.suite_engines import ENGINES
from support.workers.skipped_steps import steps

from polyshard.testing import run_ranks

CASES = [
    ("torch", torch.float32),
    ("megatron", torch.float32),
    ("megatron", torch.bfloat16),  # with masters
    ("fairscale", torch.float32),
    ("deepspeed", torch.float32),
    ("deepspeed", torch.bfloat16),
]


@pytest.mark.parametrize(("adapter", "dtype"), CASES, ids=[f"{a} {str(d)[6:]}" for a, d in CASES])
def test_skipped_steps_discarded_gradients_evaluation_and_misuse_leave_training_right(adapter, dtype):
    engines = [e for e in ENGINES[adapter] if (adapter, dtype, e.get("zero_stage")) != ("deepspeed", torch.bfloat16, 0)]
    for outcome in run_ranks(steps, 2, adapter, engines, dtype, timeout=120):
        for options, skipped, changed, waits, updates, plain, disturbed, errors, trains_again in outcome:
            assert skipped == [False, True, False], options
            assert changed == [True, False, True], options
            assert waits == [True, False] * 3, options
            assert updates == 2, options
            norms, saved, held = zip(plain, disturbed)
            assert norms[0] == norms[1], options
            assert saved[0] == saved[1], options
            for (name, start, values), (_, other, found) in zip(*held, strict=True):
                assert start == other, (options, name)
                assert torch.equal(values, found), (options, name)
            shards = options in ({"data_parallel": "fsdp"}, {"zero_stage": 3})
            copies = dtype == torch.bfloat16 or (adapter == "deepspeed" and options["zero_stage"] in (1, 2))
            held = "keeps shards" if shards else "keeps copies" if copies else ""
            assert held in errors[0] if held else not errors[0], options
            needs_forward = adapter == "fairscale" or options in ({"data_parallel": "ddp"}, {"zero_stage": 3})
            assert "does not come from the engine" in errors[1] if needs_forward else not errors[1], options
            assert "keeps shards" in errors[2] if shards else not errors[2], options
            assert "belongs to an earlier engine" in errors[3] if shards else not errors[3], options
            drops = options == {"zero_stage": 2} or (adapter == "deepspeed" and options == {"zero_stage": 1})
            assert "averaged gradients wait for a step" in errors[4] if drops else not errors[4], options
            assert trains_again, options
