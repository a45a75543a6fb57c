"""Fingerprints add up over the parts of a tensor, however it is cut, and tell any change of its bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyshard.weights.fingerprint import MASK, _table, fingerprint, text, total

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool)


def sample(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    cut_rows=st.floats(0, 1),
    cut_columns=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
)
def test_parts_add_up_wherever_the_cut(rows, columns, cut_rows, cut_columns, dtype):
    whole = sample((rows, columns), dtype)
    r, c = int(rows * cut_rows), int(columns * cut_columns)
    parts = [
        fingerprint(whole[:r, :c], (0, 0)),
        fingerprint(whole[:r, c:], (0, c)),
        fingerprint(whole[r:], (r, 0)),
    ]
    assert total(parts) == fingerprint(whole)


def test_strides_do_not_matter():
    whole = sample((33, 20), torch.float32)
    assert fingerprint(whole.t().contiguous().t()) == fingerprint(whole)
    wide = torch.zeros(33, 47)
    wide[:, 9:29] = whole
    assert fingerprint(wide[:, 9:29]) == fingerprint(whole)


@pytest.mark.parametrize("shape", [(), (7,), (5, 8), (3, 4, 6), (2, 3, 4, 5)])
def test_any_number_of_dimensions(shape):
    whole = sample(shape, torch.float32)
    if shape:
        parts = [fingerprint(part, (i, *[0] * (len(shape) - 1))) for i, part in enumerate(whole.split(1))]
        assert total(parts) == fingerprint(whole)
    assert fingerprint(whole) != fingerprint(whole + 1)


def test_it_is_the_sum_that_the_docstring_states():
    whole = sample((30, 20), torch.float32)
    words = whole.numpy().view(np.uint64)
    columns, rows = _table(1, 1024, "cpu")[:10].numpy(), _table(0, 1024, "cpu")[:30].numpy()
    expected = sum(
        int(words[r, c]) * (int(columns[c]) & MASK) * (int(rows[r]) & MASK) for r in range(30) for c in range(10)
    )
    assert fingerprint(whole) == expected & MASK
    assert text(expected) == f"{expected & MASK:016x}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_change_shows(dtype):
    whole = sample((24, 32), dtype)
    changes = {
        "a bit": lambda t: t.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[3, 5].add_(1),
        "rows swapped": lambda t: t[[1, 2]].copy_(t[[2, 1]].clone()),
        "halves swapped": lambda t: t.copy_(torch.cat((t[12:], t[:12]))),
        "columns rolled": lambda t: t.copy_(t.roll(4, 1)),
        "a part missing": lambda t: t[20:].zero_(),
        "sign of zero": lambda t: t[0, :1].copy_(torch.tensor([-0.0])),
    }
    for name, change in changes.items():
        before, after = whole.clone(), whole.clone()
        if name == "sign of zero":
            before[0, 0] = 0.0
        if name == "rows swapped":
            after[[1, 2]] = whole[[2, 1]]
        else:
            change(after)
        assert fingerprint(after) != fingerprint(before), name
    square = sample((16, 16), dtype)
    assert fingerprint(square.t()) != fingerprint(square)


def test_nothing_is_nothing():
    assert fingerprint(torch.empty(0, 5)) == 0
