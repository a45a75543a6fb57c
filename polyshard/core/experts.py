"""A bank of experts as data, and the routing of tokens to them: what adapters' experts and the layer share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.weight_sharding import ExpertRange, Segment, WeightLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class ClampedSwiglu:
    """The activation of gpt-oss: `(up + 1) * gate * sigmoid(alpha * gate)`, with gate and up clamped.

    Attributes:
        alpha: factor in the sigmoid.
        limit: gate is at most this, and up lies between plus and minus this.

    Examples:
        >>> ClampedSwiglu()
        ClampedSwiglu(alpha=1.702, limit=7.0)
    """

    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertStorage:
    """How a family's checkpoints store the weights of experts.

    Attributes:
        gate: name of the gate projection of an expert.
        up: name of the up projection.
        down: name of the down projection; of stacked experts, of the parameter.
        stacked: None if each expert is stored by itself, as `experts.3.gate_proj.weight` `[expert size, hidden]`; else
            the name of the parameter that holds the gate and up projections of all experts,
            `[experts, hidden, 2 * expert size]`, beside `down` `[experts, expert size, hidden]`.
        interleaved: of stacked experts, whether gate and up alternate, instead of all gates before all ups.
        transposed: of stacked experts, whether the matrices are transposed, as above; else `[experts, 2 * expert size,
            hidden]` and `[experts, hidden, expert size]`.
        beside_router: of stacked experts, whether their parameters are stored beside the router, instead of in
            `experts`.

    Examples:
        >>> ExpertStorage(gate="w1", up="w3", down="w2")  # Mixtral
        ExpertStorage(gate='w1', up='w3', down='w2', stacked=None, interleaved=False, transposed=True, beside_router=False)
    """  # noqa: E501

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    stacked: str | None = None
    interleaved: bool = False
    transposed: bool = True
    beside_router: bool = False

    @property
    def is_transposed(self) -> bool:
        """Whether the matrices of the experts are `[in, out]`; experts that are stored one by one are `[out, in]`."""
        return self.stacked is not None and self.transposed


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertBank:
    """The experts of one layer, as given to `create_experts` of a `LinearAdapter`.

    An expert computes `down(activation(gate x, up x))`. The bank's parameters are `gate_up`
    `[local experts, 2 * local size, hidden]` and `down` `[local experts, hidden, local size]`; of transposed storage,
    `[local experts, hidden, 2 * local size]` and `[local experts, local size, hidden]`. With `bias` they are followed
    by `gate_up_bias` `[local experts, 2 * local size]` and `down_bias` `[local experts, hidden]`. The local size is the
    expert size divided by the tensor-parallel size.

    Attributes:
        hidden_size: size of the tokens.
        expert_size: size between the projections of an expert.
        num_experts: number of experts of the layer.
        activation: `"silu"` for SwiGLU, or the clamped one of gpt-oss.
        bias: whether the projections have biases; of stacked storage only.
        scale_input: multiply an expert's input by the routing weight, instead of its output.
        storage: names and order in checkpoints.

    Raises:
        ConfigurationError: biases with storage that is not stacked, or an unknown activation.

    Examples:
        >>> bank = ExpertBank(hidden_size=16, expert_size=8, num_experts=4)
        >>> bank.layouts(expert_rank=1, expert_size=2)["down"].local_shape(0, 1)
        (2, 16, 8)
    """

    hidden_size: int
    expert_size: int
    num_experts: int
    activation: str | ClampedSwiglu = "silu"
    bias: bool = False
    scale_input: bool = False
    storage: ExpertStorage = ExpertStorage()

    def __post_init__(self) -> None:
        if self.bias and self.storage.stacked is None:
            raise ConfigurationError(
                "The experts' biases are unsupported: got storage expert by expert, expected stacked storage. Set "
                "ExpertStorage(stacked=...)."
            )
        if self.activation != "silu" and not isinstance(self.activation, ClampedSwiglu):
            raise ConfigurationError(
                f"The experts' activation is unknown: got {self.activation!r}, expected 'silu' or ClampedSwiglu(...)."
            )

    def layouts(self, expert_rank: int, expert_size: int) -> dict[str, WeightLayout]:
        """Return the layouts of the parameters, for one position along the expert axis.

        Raises:
            LayoutError: the experts cannot be divided by the size of the axis.
        """
        experts = ExpertRange.of_rank(self.num_experts, expert_rank, expert_size)
        count, hidden, size = self.num_experts, self.hidden_size, self.expert_size
        storage = self.storage
        if storage.stacked is None:
            segments = (Segment(size=size, name=storage.gate), Segment(size=size, name=storage.up))
            down = (Segment(size=size, name=storage.down),)
            return {
                "gate_up": WeightLayout(shape=(count, 2 * size, hidden), dim=1, segments=segments, experts=experts),
                "down": WeightLayout(shape=(count, hidden, size), dim=2, segments=down, experts=experts),
            }
        # Interleaved, a gate and its up projection are one block.
        segments = (Segment(size=2 * size, unit=2),) if storage.interleaved else (Segment(size=size),) * 2
        gate_up, rows = ((count, hidden, 2 * size), 2) if storage.transposed else ((count, 2 * size, hidden), 1)
        down, columns = ((count, size, hidden), 1) if storage.transposed else ((count, hidden, size), 2)
        result = {
            "gate_up": WeightLayout(shape=gate_up, dim=rows, segments=segments, experts=experts),
            "down": WeightLayout(shape=down, dim=columns, experts=experts),
        }
        if self.bias:
            result["gate_up_bias"] = WeightLayout(shape=(count, 2 * size), dim=1, segments=segments, experts=experts)
            result["down_bias"] = WeightLayout(shape=(count, hidden), experts=experts)
        return result

    def canonical_names(self) -> dict[str, str]:
        """Return the canonical name of each parameter inside the bank."""
        if self.storage.stacked is None:
            return {"gate_up": "gate_up.weight", "down": "down.weight"}
        stacked, down = self.storage.stacked, self.storage.down
        names = {"gate_up": stacked, "down": down}
        return names | ({"gate_up_bias": f"{stacked}_bias", "down_bias": f"{down}_bias"} if self.bias else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The experts of each token, in the order in which their outputs are added, in float32.

    Attributes:
        weights: float32 `[tokens, experts per token]`.
        experts: int64 `[tokens, experts per token]`, numbers among all experts of the layer.
    """

    weights: torch.Tensor
    experts: torch.Tensor


@runtime_checkable
class ExpertsAdapter(Protocol):
    """A `LinearAdapter` that builds experts; others use the torch adapter's."""

    def create_experts(self, bank: ExpertBank, parallel_context: ParallelContext) -> nn.Module:
        """Build the experts of this rank, a module `(x [tokens, hidden], Routing) -> [tokens, hidden]`.

        The result is summed over the tensor and the expert axis, and no token is dropped. Rank r of the expert axis
        holds the r-th run of experts. The gradient of a parameter is divided by the expert-parallel size, so that
        engines average it over the ranks that hold the same experts.
        """
        ...
