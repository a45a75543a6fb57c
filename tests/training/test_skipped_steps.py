"""Steps with a gradient that is not finite, discarded gradients, and evaluation between backward and step."""

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
def test_skipped_steps_discarded_gradients_and_evaluation_change_no_weights(adapter, dtype):
    engines = [e for e in ENGINES[adapter] if (adapter, dtype, e.get("zero_stage")) != ("deepspeed", torch.bfloat16, 0)]
    for outcome in run_ranks(steps, 2, adapter, engines, dtype, timeout=120):
        for options, skipped, changed, updates, plain, disturbed in outcome:
            assert skipped == [False, True, False], options
            assert changed == [True, False, True], options
            assert updates == 2, options
            norms, saved, held = zip(plain, disturbed)
            assert norms[0] == norms[1], options
            assert saved[0] == saved[1], options
            for (name, start, values), (_, other, found) in zip(*held, strict=True):
                assert start == other, (options, name)
                assert torch.equal(values, found), (options, name)
