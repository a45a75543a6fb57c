"""Balance of the load over experts: auxiliary losses, updates of router biases, and statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from polyshard.core.context import ParallelAxis
from polyshard.core.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Coefficients of the means by which training balances the load of the experts; 0 switches one off.

    The balance losses are `experts * sum(f * P)`, where f is the share of the choices that an expert gets, and P its
    mean score, divided by the sum of a token's scores. They are 1 for a balanced load. (transformers'
    `load_balancing_loss_func` is `experts per token` times as large, and mixes the layers.)

    Attributes:
        sequence: coefficient of the balance loss of each sequence (DeepSeek-V3).
        batch: coefficient of the balance loss over the tokens of a micro-batch on all replicas.
        z: coefficient of the mean of `logsumexp(logits)²` (ST-MoE).
        bias_rate: step of `polyshard.update_router_bias`, which balances without a loss (DeepSeek-V3: 0.001).

    Raises:
        ConfigurationError: a coefficient is negative or not a finite number.

    Examples:
        >>> Balance(batch=0.01, z=0.001).batch
        0.01
    """

    sequence: float = 0.0
    batch: float = 0.0
    z: float = 0.0
    bias_rate: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigurationError(f"Balance.{field.name} is invalid: got {value!r}, expected 0 or more.")

    @property
    def has_loss(self) -> bool:
        """Whether there is a loss to be added to the model's."""
        return bool(self.sequence or self.batch or self.z)


def choices_by_sequence(experts: torch.Tensor, num_experts: int, rows: torch.Tensor | None, count: int) -> torch.Tensor:
    """Count how often the tokens of each sequence chose each expert: int64 `[count, num_experts]`.

    Args:
        experts: `[tokens, experts per token]`.
        num_experts: number of experts.
        rows: int64 `[tokens]`, the sequence of each token; None for one sequence.
        count: number of sequences.
    """
    cells = experts if rows is None else experts + rows.unsqueeze(1) * num_experts
    cells = cells.reshape(-1)
    counts = torch.zeros(count * num_experts, dtype=torch.int64, device=cells.device)  # bincount waits for the device
    return counts.scatter_add_(0, cells, torch.ones_like(cells)).view(count, num_experts)


def summed_over(axes: tuple[ParallelAxis, ...], tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over axes. A collective."""
    for axis in axes:
        if axis.size > 1:
            assert axis.collectives is not None
            tensor = axis.collectives.all_reduce(tensor)
    return tensor


def balance_loss(
    shares: torch.Tensor, counts: torch.Tensor, rows: torch.Tensor | None, lengths: torch.Tensor
) -> torch.Tensor:
    """Return the mean over this rank's tokens of the balance loss, a scalar.

    Args:
        shares: float32 `[tokens, experts]`, the scores of a token, divided by their sum.
        counts: `[sequences, experts]`, from `choices_by_sequence`, of all ranks that share a sequence.
        rows: `[tokens]`, the sequence of each token; None for one sequence.
        lengths: `[sequences]`, this rank's tokens of each sequence.
    """
    chosen = counts.to(shares.dtype)
    frequency = chosen / chosen.sum(1, keepdim=True).clamp_min(1.0) * shares.shape[1]
    if rows is None:
        return (shares.mean(0) * frequency[0]).sum()
    summed = torch.zeros_like(frequency).index_add(0, rows, shares)
    return (summed * frequency).sum() / lengths.sum()


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of the squared log-sum-exp of logits `[tokens, experts]`, a scalar."""
    return logits.float().logsumexp(-1).square().mean()


@torch.no_grad()
def summed_entropy(shares: torch.Tensor) -> torch.Tensor:
    """Return the sum over tokens of the entropy of scores `[tokens, experts]` that add up to 1, in nats."""
    return torch.special.entr(shares).sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStatistics:
    """What a router of one layer has chosen, over all replicas.

    Attributes:
        load: float64 `[experts]` on the CPU, how many tokens each expert got.
        entropy: mean over the tokens of the entropy of the scores, in nats; `log(experts)` if all experts are equal.
        tokens: number of tokens.

    Examples:
        >>> RouterStatistics(load=torch.tensor([6.0, 2.0]), entropy=0.5, tokens=8).imbalance
        1.5
    """

    load: torch.Tensor
    entropy: float
    tokens: int

    @property
    def imbalance(self) -> float:
        """The largest load over the mean load: 1 for a balanced load."""
        return float(self.load.max() / self.load.mean().clamp_min(1e-30))
