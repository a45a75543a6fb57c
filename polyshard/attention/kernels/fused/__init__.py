"""Attention on a CPU, computed in float32, compiled on first use by the C++ compiler of the machine.

`runs` is attention of packed sequences with a backward, `paged` that of requests over a paged cache.
"""

from polyshard.attention.kernels.fused.runs import backward_run, forward_run, rejects, worthwhile

__all__ = ["backward_run", "forward_run", "rejects", "worthwhile"]
