"""The mixture-of-experts layer, as a function of a parallel context."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from polyshard.core.computation import Setting, describe
from polyshard.core.context import ParallelContext
from polyshard.core.errors import AdapterError, ConfigurationError, LayoutError
from polyshard.core.experts import ClampedSwiglu, ExpertBank, ExpertStorage
from polyshard.core.linear_adapter import adapter_with, choose_adapter
from polyshard.core.weight_table import set_layouts, store_as
from polyshard.experts.balance import Balance
from polyshard.experts.observed import Observed, in_backward, observe
from polyshard.experts.router import Router
from polyshard.experts.step_routing import GivenExperts, of_this_rank
from polyshard.layers.activation import swiglu
from polyshard.layers.differentiable import sum_gradient
from polyshard.layers.forward_gradients import without_autocast
from polyshard.layers.linear import column_parallel, row_parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedExperts:
    """A dense SwiGLU MLP that every token passes, beside its experts.

    Attributes:
        size: size between the projections; of several shared experts, the sum of their sizes.
        gated: multiply the output by `sigmoid(shared_expert_gate x)` (Qwen2-MoE).
        name: name of the MLP in checkpoints.

    Raises:
        ConfigurationError: the size is not a positive integer.

    Examples:
        >>> SharedExperts(size=64, gated=True, name="shared_expert")
        SharedExperts(size=64, gated=True, name='shared_expert')
    """

    size: int
    gated: bool = False
    name: str = "shared_experts"

    def __post_init__(self) -> None:
        _check_size("SharedExperts.size", self.size)


def mixture_of_experts(
    hidden_size: int,
    expert_size: int,
    num_experts: int,
    experts_per_token: int,
    parallel_context: ParallelContext,
    *,
    router: Router | None = None,
    shared: SharedExperts | None = None,
    balance: Balance | None = None,
    activation: str | ClampedSwiglu = "silu",
    bias: bool = False,
    router_name: str = "gate",
    storage: ExpertStorage | None = None,
    linear: Any = None,
) -> MixtureOfExperts:
    """Create a mixture-of-experts layer whose experts are sharded over the expert axis, and each over the tensor axis.

    No token is dropped. The outputs of a token are added in float32, in the order of descending scores; Megatron's
    experts add them in their dtype, in the order of the experts.

    Args:
        hidden_size: size of the input's and the output's last dimension.
        expert_size: size between the projections of an expert.
        num_experts: number of experts.
        experts_per_token: number of experts that each token takes.
        parallel_context: the parallel context.
        router: how experts are chosen; by default softmax over all experts, not normalized.
        shared: a dense MLP that every token passes besides.
        balance: losses and bias updates that balance the load in training; none by default.
        activation: `"silu"` for SwiGLU, or `ClampedSwiglu()`.
        bias: add biases in the experts; for stacked storage only.
        router_name: name of the router in checkpoints.
        storage: names and order of the experts' weights in checkpoints; those of Qwen3-MoE and DeepSeek by default.
        linear: the linear adapter of another library for this layer; `parallel_context.linear` by default.

    Returns:
        A module `(x [..., hidden], cu_seqlens=None) -> [..., hidden]`. The boundaries of packed sequences are only
        needed by `Balance(sequence=...)`.

    Raises:
        LayoutError: the experts or their size cannot be divided by the size of their axis.
        ConfigurationError: the router does not fit the experts, or an argument is of the wrong kind.
        AdapterError: the context is in exact mode, which does not support the experts of this library.

    Examples:
        >>> context = ps.initialize("torch")
        >>> layer = ps.mixture_of_experts(16, 32, 8, 2, context, router=ps.Router(normalize=True))
        >>> layer(torch.ones(5, 16)).shape
        torch.Size([5, 16])
    """
    _check_types(router=(router, Router), shared=(shared, SharedExperts), balance=(balance, Balance))
    _check_types(storage=(storage, ExpertStorage))
    sizes = {"hidden_size": hidden_size, "expert_size": expert_size, "num_experts": num_experts}
    for name, size in {**sizes, "experts_per_token": experts_per_token}.items():
        _check_size(f"mixture_of_experts: {name}", size)
    router = router or Router()
    router.check(num_experts, experts_per_token)
    bank = ExpertBank(
        hidden_size=hidden_size,
        expert_size=expert_size,
        num_experts=num_experts,
        activation=activation,
        bias=bias,
        scale_input=router.scale_input,
        storage=storage or ExpertStorage(),
    )
    _check_divides(bank, parallel_context)
    adapter = adapter_with(choose_adapter(linear, parallel_context), "create_experts")
    return MixtureOfExperts(
        bank, experts_per_token, parallel_context, adapter, router, shared, balance or Balance(), router_name
    )


class MixtureOfExperts(nn.Module):
    """The layer that `mixture_of_experts` returns; `x [..., hidden], cu_seqlens=None -> [..., hidden]`.

    Attributes:
        bank: sizes and names of the experts.
        rule: how experts are chosen.
        balance: losses and bias updates in training.
        replay: experts `[tokens, experts per token]` of the next forward pass; see `polyshard.replay_routing`.
        given: the experts of all micro-batches; None if the router chooses.
        recorded: the experts of the last forward pass, while `polyshard.record_routing` records; else None.
        recorded_in_step: the experts of each micro-batch of the last step.

    Examples:
        >>> layer = ps.mixture_of_experts(16, 32, 8, 2, ps.initialize("torch"))
        >>> isinstance(layer, MixtureOfExperts)
        True
    """

    def __init__(
        self,
        bank: ExpertBank,
        experts_per_token: int,
        context: ParallelContext,
        adapter: Any,
        router: Router,
        shared: SharedExperts | None,
        balance: Balance,
        router_name: str,
    ) -> None:
        super().__init__()
        self.bank, self.rule, self.balance, self.context = bank, router, balance, context
        self.experts_per_token = experts_per_token
        self._gate, self._shared = router_name, shared
        describe(
            self, experts_per_token=experts_per_token, activation=str(bank.activation), **_settings(router, context)
        )
        self.add_module(router_name, _gate(bank, router, context))
        self.experts = adapter.create_experts(bank, context)
        attach_expert_layouts(self.experts, bank, context)
        if bank.storage.beside_router:
            store_as(self, "experts", "")
        if shared is not None:
            self.add_module(shared.name, _SharedMLP(bank.hidden_size, shared.size, context))
            if shared.gated:
                self.shared_expert_gate = _matrix(bank.hidden_size, 1, Router(), context)
        self.sigmoid = torch.sigmoid if context.exact is None else context.exact.sigmoid
        self.replay: torch.Tensor | None = None
        self.replayed_last: torch.Tensor | None = None  # for a recomputation of the last forward pass
        self.given: GivenExperts | None = None
        self.records = False
        self.recorded: torch.Tensor | None = None
        self.recorded_in_step: dict[int, torch.Tensor] = {}
        self.observed = Observed()

    @property
    def matrix(self) -> nn.Module:
        """The router's matrix and biases."""
        return getattr(self, self._gate)

    @property
    def correction(self) -> torch.Tensor | None:
        """The bias on the router's scores for the choice, float32 `[experts]`; None without one."""
        bias = getattr(self.matrix, "e_score_correction_bias", None)
        return bias if bias is None or bias.dim() == 1 else bias.view(-1)  # ERNIE 4.5 stores [1, experts]

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Return the sum of the experts' outputs for each token, `[..., hidden]`, in the shape of the input."""
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.matrix(tokens)
        chosen = self._replayed(x.shape)
        routing = self.rule.route(logits, self.experts_per_token, self.correction, chosen, self.sigmoid)
        if self.records and not in_backward():
            self.recorded = routing.experts
        if self.training:
            observe(self, logits, routing.experts, x.shape, cu_seqlens)
        y = self.experts(tokens, routing).view_as(x)
        if self._shared is None:
            return y
        shared = getattr(self, self._shared.name)(x)
        return y + (self.sigmoid(self.shared_expert_gate(x)) * shared if self._shared.gated else shared)

    def _replayed(self, shape: torch.Size) -> torch.Tensor | None:
        if not in_backward():
            if self.given is not None and self.replay is None:
                raise ConfigurationError(
                    f"experts of {len(self.given.experts)} micro-batches are replayed in a forward pass of your own. "
                    "Use engine.train_batch or engine.eval_batch, or enter ps.replay_routing for each forward pass."
                )
            self.replayed_last = self.replay
        if self.replayed_last is None:
            return None
        experts, tokens = of_this_rank(self.replayed_last, shape, self.context), shape[:-1].numel()
        if experts.shape != (tokens, self.experts_per_token):
            everywhere = tokens * (self.context.axis("tensor").size if self.context.layout.sequence_parallel else 1)
            raise ConfigurationError(
                f"the replayed experts have the wrong shape: got {tuple(experts.shape)}, expected "
                f"{(everywhere, self.experts_per_token)}, tokens by experts per token."
            )
        return experts

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"experts={self.bank.num_experts}, per_token={self.experts_per_token}"


class Gate(nn.Module):
    """The router's matrix: `[..., hidden]` to logits `[..., experts]`; replicated on every rank."""

    def __init__(self, hidden_size: int, num_experts: int, router: Router, context: ParallelContext) -> None:
        super().__init__()
        # Under sequence parallel, each tensor-parallel rank routes its own tokens.
        self.axis = context.axis("tensor") if context.layout.sequence_parallel else None
        self.dtype = router.dtype
        bound = hidden_size**-0.5
        # Not in trainers: FSDP2 takes one dtype only. Not in exact mode: a trainer rounds it to the model's dtype.
        keeps = router.float32_weight and context.attention is not None and context.exact is None
        dtype = torch.float32 if keeps else None
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype, device=context.device))
        if context.initialize_weights:
            nn.init.uniform_(self.weight, -bound, bound)
        self.bias = nn.Parameter(torch.zeros(num_experts, device=context.device)) if router.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, in the router's dtype."""
        weight, bias = self.weight, self.bias
        if self.axis is not None:
            weight = sum_gradient(weight, self.axis)
            bias = None if bias is None else sum_gradient(bias, self.axis)
        if self.dtype is None:
            return F.linear(x, weight, bias)
        with without_autocast(x.device.type):
            return F.linear(x.to(self.dtype), weight.to(self.dtype), None if bias is None else bias.to(self.dtype))


def _settings(router: Router, context: ParallelContext) -> dict[str, Setting]:
    """Return the router's settings; where an engine keeps its matrix in float32 is not one of the computation.

    Settings that compute the same have the same description, except in exact mode, in which their bits may differ.
    """
    router = router if context.exact is not None else router.simplest()
    fields = {f"router_{field.name}": getattr(router, field.name) for field in dataclasses.fields(router)}
    del fields["router_float32_weight"]
    return {**fields, "router_dtype": str(router.dtype)}


def _gate(bank: ExpertBank, router: Router, context: ParallelContext) -> nn.Module:
    """Return the router's matrix, with a correction bias if it has one."""
    gate: Any = _matrix(bank.hidden_size, bank.num_experts, router, context)
    if router.correction_bias:
        zeros = torch.zeros(bank.num_experts, dtype=torch.float32, device=context.device)
        gate.e_score_correction_bias = nn.Parameter(zeros, requires_grad=False)
    return gate


def _matrix(hidden_size: int, outputs: int, router: Router, context: ParallelContext) -> nn.Module:
    """Return a replicated matrix with the router's bias and dtype; in exact mode, with the server's matrix product."""
    gate: Any = Gate(hidden_size, outputs, router, context)
    return gate if context.exact is None else context.exact.replicated_linear(gate, context, router.dtype)


class _SharedMLP(nn.Module):
    def __init__(self, hidden_size: int, size: int, context: ParallelContext) -> None:
        super().__init__()
        self.gate_up = column_parallel(hidden_size, [size, size], context, names=["gate_proj", "up_proj"])
        self.down_proj = row_parallel(size, hidden_size, context)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(x, self.gate_up))


def attach_expert_layouts(experts: nn.Module, bank: ExpertBank, context: ParallelContext) -> None:
    """Store the layouts of a bank's parameters on it, after a check of their shapes.

    Raises:
        AdapterError: a parameter is missing, unexpected, or not this rank's shard.
    """
    tensor, axis = context.axis("tensor"), context.axis("expert")
    layouts, canonical = bank.layouts(axis.rank, axis.size), bank.canonical_names()
    shapes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
    expected = {name: layout.local_shape(tensor.rank, tensor.size) for name, layout in layouts.items()}
    if shapes != expected:
        raise AdapterError(
            f"the parameters of {type(experts).__name__} are wrong: got {shapes}, expected {expected}. Let the "
            "adapter's create_experts create this rank's shards."
        )
    set_layouts(experts, {name: (canonical[name], layout) for name, layout in layouts.items()})


def _check_types(**given: tuple[Any, type]) -> None:
    for name, (value, kind) in given.items():
        if value is not None and not isinstance(value, kind):
            raise ConfigurationError(
                f"mixture_of_experts: {name} is invalid: got {value!r}, expected a ps.{kind.__name__}."
            )


def _check_size(name: str, size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigurationError(f"{name} is invalid: got {size!r}, expected a positive integer.")


def _check_divides(bank: ExpertBank, context: ParallelContext) -> None:
    tensor, axis = context.axis("tensor"), context.axis("expert")
    try:
        for layout in bank.layouts(axis.rank, axis.size).values():
            layout.local_shape(tensor.rank, tensor.size)
    except LayoutError as error:
        raise LayoutError(f"mixture_of_experts: {error}") from None
