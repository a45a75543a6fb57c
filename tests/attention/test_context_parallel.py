"""Attention over a context axis of two ranks against one process: Ulysses bit for bit, the ring within rounding."""

import pytest
import torch
from support.workers import on_context_ranks

from polyshard.testing import run_ranks

LENGTHS = (3, 40, 1, 0, 13, 7)  # 64 tokens; sequences lie across the pieces
CASES = {
    "causal": {},
    "not causal": {"causal": False},
    "window": {"sliding_window": 6},
    "soft-cap and sinks": {"softcap": 2.0, "sinks": True},
    "alibi": {"alibi_slopes": (0.5, 0.25, 0.1, 0.0)},
    "dropout": {"dropout": 0.3},
    "one KV head": {"kv_heads": 1},
    "a batch": {"lengths": (32, 32), "rows": 2},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["ulysses", "ring"])
def test_forward_and_backward_equal_one_process(way, case):
    options = {"kv_heads": 2, "lengths": LENGTHS, **CASES[case]}
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (way, 4, options["kv_heads"], options["lengths"], dtype)
        rest = {name: value for name, value in options.items() if name not in ("kv_heads", "lengths")}
        for pairs in run_ranks(call, 2, on_context_ranks.both_ways, arguments, rest):
            for got, wanted in pairs:
                if way == "ulysses" and case not in ("one KV head", "soft-cap and sinks"):
                    assert torch.equal(got, wanted)
                bound = 16 * torch.finfo(dtype).eps if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
                assert float((got - wanted).abs().max()) <= bound * max(1.0, float(wanted.abs().max()))


def call(function, arguments, options):
    return function(*arguments, **options)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("way", ["ulysses", "ring"])
def test_a_module_over_two_ranks_equals_the_module_alone(way, packed):
    for pairs in run_ranks(on_context_ranks.modules, 2, way, packed):
        for got, wanted in pairs:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["ulysses", "ring"])
def test_a_batch_without_rows_has_no_output(way):
    for shape, gradients in run_ranks(on_context_ranks.without_rows, 2, way):
        assert shape == (0, 8, 32)
        assert not any(gradients)


def test_what_does_not_fit_is_refused_with_the_way_out():
    for messages in run_ranks(on_context_ranks.misuse, 2):
        assert "context-parallel size 2: got 6, expected a multiple of 4. Pad" in messages[0]
        assert "got 4 tokens in the sequences, expected 8 (4 on each of 2 ranks)" in messages[1]
        assert "Ulysses cannot divide the heads: got 3 query and 3 KV heads over 2 ranks" in messages[2]
        assert len(messages) == 3
