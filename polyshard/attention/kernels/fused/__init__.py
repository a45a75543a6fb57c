"""Attention on a CPU, computed in float32, compiled on first use by the C++ compiler of the machine."""

from polyshard.attention.kernels.fused.runs import (
    attend_into,
    backward_run,
    forward_run,
    rejects,
    worthwhile,
    worthwhile_all,
)

__all__ = ["attend_into", "backward_run", "forward_run", "rejects", "worthwhile", "worthwhile_all"]
