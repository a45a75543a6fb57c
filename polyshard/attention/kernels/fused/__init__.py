"""Attention in float32 on a CPU, compiled on first use by the C++ compiler of the machine."""

from polyshard.attention.kernels.fused.runs import backward_run, forward_run, rejects, worthwhile

__all__ = ["backward_run", "forward_run", "rejects", "worthwhile"]
