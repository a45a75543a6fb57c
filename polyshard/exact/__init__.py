"""Exact mode: the trainer's log-probabilities equal the server's, bit for bit.

On both sides, every operator of the forward pass is replaced by one whose result for a row does not depend on the
batch, and sums over the tensor axis are computed in the same order at every size. docs/explanation/exactness.md lists
the replaced operators and the reasons.
"""

from polyshard.exact.context import exact_context
from polyshard.exact.linear import ExactLinearAdapter

__all__ = ["ExactLinearAdapter", "exact_context"]
