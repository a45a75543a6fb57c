"""Attention modules and functions with a backward pass, and the kernels behind them."""

from polyshard.attention.functional import packed_attention
from polyshard.attention.mla import TrainableMLA
from polyshard.attention.module import TrainableFlashAttention
from polyshard.attention.rotary import RotaryEmbedding
from polyshard.attention.selection import explain, select_kernel

__all__ = ["RotaryEmbedding", "TrainableFlashAttention", "TrainableMLA", "explain", "packed_attention", "select_kernel"]
