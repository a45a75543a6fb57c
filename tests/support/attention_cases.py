"""Packed attention with each feature: sizes, inputs and error bounds that several test files share."""

import torch

LENGTHS = (5, 5, 1, 0, 17, 300)
SLOPES = (0.5, 0.25, 0.0, 0.01)
FEATURES = {
    "causal": {},
    "not causal": {"causal": False},
    "window": {"window": 7},
    "long window": {"window": 290},
    "window, not causal": {"window": 7, "causal": False},
    "soft-cap": {"softcap": 3.0},
    "alibi": {"slopes": SLOPES},
    "sinks": {"sinks": True},
    "scale": {"scale": 0.5},
    "values wider": {"value_dim": 40},
    "values narrower": {"value_dim": 8},
    "more keys than queries": {"key_lengths": (9, 5, 1, 3, 20, 310)},
    "everything": {"window": 9, "softcap": 2.0, "slopes": SLOPES, "sinks": True, "value_dim": 24},
}


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)])


def case(lengths, heads, kv_heads, dim, dtype, seed=0, key_lengths=None, value_dim=None, sinks=False):
    """q, k, v, the output's gradient, and sinks or None."""
    generator = torch.Generator().manual_seed(seed)
    tokens, key_tokens = sum(lengths), sum(key_lengths or lengths)
    shapes = [(tokens, heads, dim), (key_tokens, kv_heads, dim), (key_tokens, kv_heads, value_dim or dim)]
    shapes += [(tokens, heads, value_dim or dim), (heads,)]
    *tensors, logits = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return (*tensors, logits if sinks else None)


def bound_of(dtype):
    """Roundings of the dtype, relative to the largest entry: a few in half precision; in full, sums of hundreds."""
    return torch.finfo(dtype).eps * (4 if dtype.itemsize == 2 else 64)
