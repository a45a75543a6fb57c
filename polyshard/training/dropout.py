"""Dropout whose mask depends only on seed, token position and channel position, not on the parallel layout."""

from __future__ import annotations

import numbers
from typing import Literal, get_args

import torch
from torch import nn

from polyshard.attention.context_parallel.shards import context_shard
from polyshard.attention.kernels.cpu.dropout import kept
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError

Region = Literal["residual", "parallel"]


class Dropout(nn.Module):
    """Drop activations in training; every parallel layout drops the same elements as a single process.

    The seed is drawn from torch's CPU generator at each call, so recomputation draws the same mask. Ranks that share an
    activation must have that generator in the same state: see `polyshard.manual_seed`. A slice of the input gets that
    slice of the mask: replicated activations have the same mask on all tensor-parallel ranks, and sharded tokens or
    channels have different ones.

    Args:
        p: probability of dropping an element, in [0, 1].
        parallel_context: the parallel context.
        region: `"residual"` for hidden states between blocks, which are replicated over tensor-parallel ranks, or
            sharded along the tokens under sequence parallelism. `"parallel"` for activations between a column-parallel
            and a row-parallel layer, which have all tokens and this rank's channels.

    Shape:
        This rank's part, `[batch, seq, channels]` or packed `[tokens, channels]`, to the same shape and dtype.

    Raises:
        ConfigurationError: `p` is outside [0, 1], or the region is unknown.

    Examples:
        >>> context = ps.initialize("torch", device="cpu")
        >>> ps.manual_seed(0, context)
        >>> dropout = ps.Dropout(0.5, context)
        >>> sorted(set(dropout(torch.ones(8, 16)).flatten().tolist()))
        [0.0, 2.0]
        >>> dropout.eval()(torch.ones(2, 2)).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """

    def __init__(self, p: float, parallel_context: ParallelContext, *, region: Region = "residual") -> None:
        super().__init__()
        if not isinstance(p, numbers.Real) or not 0.0 <= p <= 1.0:
            raise ConfigurationError(f"the dropout probability is invalid: got {p!r}, expected a number in [0, 1]")
        if region not in get_args(Region):
            raise ConfigurationError(f"region is unsupported: got {region!r}, expected one of {get_args(Region)}")
        self.p, self.region, self.context = p, region, parallel_context

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop elements, and scale the others by `1 / (1 - p)`."""
        if not self.training or self.p == 0.0:
            return x
        seed = torch.randint(2**62, (), device="cpu")
        if self.p == 1.0:
            return x * 0.0
        tokens = token_numbers(x.shape[:-1], self.context, x.device, self.region)
        channels = torch.arange(x.shape[-1], device=x.device)
        if self.region == "parallel":
            channels = channels + self.context.axis("tensor").rank * x.shape[-1]
        keep = kept(seed, self.p, tokens.new_zeros(()), tokens[:, None], channels[None]).view(x.shape)
        return torch.where(keep, x * (1.0 / (1.0 - self.p)), x.new_zeros(()))

    def extra_repr(self) -> str:
        """Return the settings shown in the module's repr."""
        return f"p={self.p}, region={self.region!r}"


def token_numbers(
    lead: torch.Size, context: ParallelContext, device: torch.device, region: Region = "residual"
) -> torch.Tensor:
    """Return the indices of this rank's tokens among those of all ranks that share the batch, int64 `[tokens]`.

    Args:
        lead: `[batch, seq]` or `[tokens]` of this rank's part.
        context: the parallel context.
        device: device of the result.
        region: see `Dropout`.
    """
    axis = context.axis("tensor")
    parts = axis.size if context.layout.sequence_parallel and region == "residual" else 1
    rows, length = (1, lead[0]) if len(lead) == 1 else (lead[:-1].numel(), lead[-1])
    total = length * parts * context.axis("context").size
    numbers = context_shard(torch.arange(total, device=device), context)
    if parts > 1:
        numbers = numbers.narrow(0, axis.rank * length, length)
    return (torch.arange(rows, device=device)[:, None] * total + numbers[None]).flatten()
