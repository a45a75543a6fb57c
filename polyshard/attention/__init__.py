"""Trainable attention and its kernels."""

from polyshard.attention.module import TrainableFlashAttention
from polyshard.attention.rotary import RotaryEmbedding
from polyshard.attention.selection import explain, select_kernel

__all__ = ["RotaryEmbedding", "TrainableFlashAttention", "explain", "select_kernel"]
