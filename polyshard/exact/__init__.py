"""Exact mode: the trainer's log-probabilities equal the server's, bit for bit.

Every operator of a forward is exchanged, on both sides, for one that gives a row the same bits in whatever batch it
stands; sums over the tensor axis are taken in one order at every size. docs/explanation/exactness.md says which
operators are replaced, and why.
"""

from polyshard.exact.context import exact_context
from polyshard.exact.linear import ExactLinearAdapter

__all__ = ["ExactLinearAdapter", "exact_context"]
