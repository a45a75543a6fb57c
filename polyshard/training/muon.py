"""Muon for matrices with AdamW for the rest, on whole matrices at every parallel layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from polyshard.core.context import FailureGuard, ParallelAxis, ParallelContext, no_guard
from polyshard.core.errors import ConfigurationError
from polyshard.core.optimizer import AdamW, check_setting
from polyshard.core.parameter_groups import LR_SCALE, NamedParameters, ParameterGroup, group_settings
from polyshard.core.weight_sharding import WeightLayout, replicated
from polyshard.core.weight_table import WeightTable
from polyshard.weights.gather import gather_shards

AdjustRate = Literal["original", "match_rms_adamw"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Muon:
    """Muon for the matrices of a model, and AdamW for its vectors and for the matrices that you exclude.

    Each update gathers a matrix over the tensor axis and over FSDP2's shards, and runs `torch.optim.Muon` on all of it:
    the update of a shard would be another one. A fused layer (`qkv`, `gate_up`) counts as the matrices that a
    checkpoint stores, each by itself. Every rank computes the update of every matrix, so it costs as much as in one
    process. Supported by the torch engine, DeepSpeed at stage 0 and FairScale.

    Attributes:
        exclude: patterns of matrices that AdamW updates; usually the embedding and the output layer.
        lr: learning rate.
        momentum: decay rate of the momentum.
        nesterov: whether to use Nesterov momentum.
        weight_decay: of matrices, decoupled.
        ns_steps: number of Newton-Schulz iterations.
        adjust_lr_fn: how the rate depends on the shape of a matrix; see `torch.optim.Muon`. With `"match_rms_adamw"`
            rates tuned for AdamW fit.
        adamw: settings for the rest. Its rate keeps its ratio to `lr`.
        groups: other rates and decays by parameter name; see `AdamW`.

    Raises:
        ConfigurationError: a setting is out of its range, `adamw` has groups, or a rate is not positive.

    Source: Jordan 2024, "Muon: An optimizer for hidden layers in neural networks"; `torch.optim.Muon`.

    Examples:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "linear": nn.Linear(2, 2)})
        >>> optimizer = Muon(exclude=("embed*",), lr=0.02, adamw=ps.AdamW(lr=1e-3))(model.named_parameters())
        >>> [(group["algorithm"], group["lr"]) for group in optimizer.param_groups]
        [('muon', 0.02), ('adamw', 0.001), ('adamw', 0.001)]
    """

    exclude: tuple[str, ...]
    lr: float = 1e-3
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.1
    ns_steps: int = 5
    adjust_lr_fn: AdjustRate = "original"
    adamw: AdamW = field(default_factory=AdamW)
    groups: tuple[ParameterGroup, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.exclude, str):
            raise ConfigurationError(
                f"Muon.exclude is invalid: got {self.exclude!r}, expected a tuple of patterns. Pass "
                f"({self.exclude!r},)."
            )
        for name in ("lr", "weight_decay"):
            check_setting(f"Muon.{name}", getattr(self, name))
        check_setting("Muon.momentum", self.momentum, below=1.0)
        if isinstance(self.ns_steps, bool) or not isinstance(self.ns_steps, int) or not 1 <= self.ns_steps < 100:
            raise ConfigurationError(f"Muon.ns_steps is invalid: got {self.ns_steps!r}, expected 1 to 99.")
        if self.adjust_lr_fn not in get_args(AdjustRate):
            raise ConfigurationError(
                f"Muon.adjust_lr_fn is invalid: got {self.adjust_lr_fn!r}, expected one of "
                f"{', '.join(map(repr, get_args(AdjustRate)))}."
            )
        if not isinstance(self.adamw, AdamW):
            raise ConfigurationError(f"Muon.adamw is invalid: got {self.adamw!r}, expected ps.AdamW(...).")
        if self.adamw.groups:
            raise ConfigurationError("Muon.adamw has groups: got some, expected none. Pass them as Muon(groups=...).")
        if not (self.lr > 0 and self.adamw.lr > 0):
            raise ConfigurationError(
                f"A learning rate of Muon is not positive: got {self.lr} and {self.adamw.lr} for AdamW, expected "
                "positive rates, which keep their ratio."
            )

    def __call__(self, named_parameters: NamedParameters) -> torch.optim.Optimizer:
        """Return the optimizer of whole, unfused parameters that require a gradient."""
        return self.build(named_parameters, {})

    def on(self, table: WeightTable, context: ParallelContext) -> BoundMuon:
        """Return the factory of the optimizer of a model that was built with `context`."""
        axis, guard = context.axis("tensor"), context.guard
        matrices = {
            entry.name: Matrix(
                layout=entry.layout, fused=len(entry.checkpoint_names) > 1, tensor_axis=axis, guard=guard
            )
            for entry in table.values()
        }
        return BoundMuon(self, matrices)

    def build(self, named_parameters: NamedParameters, matrices: Mapping[str, Matrix]) -> MuonWithAdamW:
        """Return the optimizer; a parameter without an entry in `matrices` is whole and unfused."""
        muon: list[dict[str, Any]] = []
        adamw: dict[Any, list[nn.Parameter]] = {}
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            excluded = any(fnmatchcase(name, pattern) for pattern in self.exclude)
            if parameter.dim() == 2 and not excluded:
                found = group_settings(name, parameter, self.groups, self.weight_decay)
                matrix = matrices.get(name) or Matrix(layout=replicated(parameter.shape))
                muon.append(
                    {"params": [parameter], "algorithm": "muon", "matrix": matrix, "name": name}
                    | {LR_SCALE: found.lr_scale, "weight_decay": found.weight_decay}
                )
            elif parameter.dim() < 2 or excluded:
                found = group_settings(name, parameter, self.groups, self.adamw.weight_decay)
                adamw.setdefault(found, []).append(parameter)
            else:
                raise ConfigurationError(
                    f"Muon updates matrices: got {name} with shape {tuple(parameter.shape)}, expected two dimensions. "
                    "Add it to exclude, and AdamW updates it."
                )
        ratio = self.adamw.lr / self.lr
        rest: list[dict[str, Any]] = [
            {"params": adamw[found], "algorithm": "adamw", LR_SCALE: found.lr_scale * ratio}
            | {"weight_decay": found.weight_decay, "betas": self.adamw.betas, "eps": self.adamw.eps}
            for found in sorted(adamw, key=lambda found: (-found.weight_decay, -found.lr_scale))
        ]
        if not muon and not rest:
            raise ConfigurationError(
                "the model has nothing to train: got no parameter that requires a gradient, expected at least one."
            )
        for group in (*muon, *rest):
            group["lr"] = self.lr * group[LR_SCALE]
        return MuonWithAdamW(
            [*muon, *rest],
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            adjust_lr_fn=self.adjust_lr_fn,
            fused=self.adamw.fused,
        )


@dataclass(frozen=True, slots=True)
class BoundMuon:
    """The optimizer factory of Muon for one model."""

    muon: Muon
    matrices: Mapping[str, Matrix]

    def __call__(self, named_parameters: NamedParameters) -> torch.optim.Optimizer:
        """Return the optimizer of the parameters that require a gradient."""
        return self.muon.build(named_parameters, self.matrices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """How this rank's part of a weight becomes the matrices that Muon orthogonalizes.

    Attributes:
        layout: of the weight.
        fused: whether its segments are matrices of their own.
        tensor_axis: over which it is sharded.
        guard: around communication.
    """

    layout: WeightLayout
    fused: bool = False
    tensor_axis: ParallelAxis = field(default_factory=lambda: ParallelAxis(name="tensor"))
    guard: FailureGuard = no_guard

    def gathered(self, part: torch.Tensor) -> list[torch.Tensor]:
        """Return the matrices, the same on every rank. A collective over the ranks that hold other parts."""
        if isinstance(part, DTensor):
            kind = part.device_mesh.device_type  # offloaded shards are on the CPU
            with self.guard("data gather of updates"):
                on_mesh: Any = part if part.device.type == kind else part.to(kind)
                part = on_mesh.full_tensor()
        full = gather_shards(part, self.layout, self.tensor_axis)
        return self.layout.split(full) if self.fused else [full]

    def sharded(self, matrices: Iterable[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of matrices, in the form of `like`; no communication."""
        full = torch.cat(list(matrices), dim=self.layout.dim or 0)
        part = self.layout.slice(full, self.tensor_axis.rank, self.tensor_axis.size)
        if isinstance(like, DTensor):
            part = distribute_tensor(part.contiguous(), like.device_mesh, like.placements, src_data_rank=None)
            part = part.to(like.device)
        return part


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer of groups for Muon, each of one weight, and of groups for AdamW.

    Args:
        params: groups with `algorithm`, and those of Muon with `matrix`.
        lr: of a group with scale 1.
        momentum: of Muon, and so on.
        nesterov: see `Muon`.
        ns_steps: see `Muon`.
        adjust_lr_fn: see `Muon`.
        fused: see `AdamW`.
    """

    kind = "muon"

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        adjust_lr_fn: AdjustRate,
        fused: bool | None = None,
    ) -> None:
        settings = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(params, {"lr": lr, "fused": fused, **settings})
        self._adamw = self._build_adamw(fused)

    def _build_adamw(self, fused: bool | None) -> torch.optim.Optimizer | None:
        groups = [group for group in self.param_groups if group["algorithm"] == "adamw"]
        if not groups:
            return None
        try:
            made = torch.optim.AdamW([group | {"fused": fused is not False} for group in groups])
        except RuntimeError:  # torch has no fused kernel for this device or dtype
            if fused:
                raise
            made = torch.optim.AdamW([group | {"fused": False} for group in groups])
        for group, its in zip(groups, made.param_groups):
            group.update(its)  # its further settings
        made.param_groups = groups  # the same dictionaries: rates that are set in one are set in the other
        made.state = self.state
        return made

    @torch.no_grad()
    def create_state(self) -> None:
        """Create the state that the first step would create."""
        for parameter, _ in self._matrices():
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.detach())

    @property
    def adamw(self) -> torch.optim.Optimizer | None:
        """The optimizer of the groups for AdamW, with the same state; None if there are none."""
        return self._adamw

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyrefly: ignore  # gives no loss
        """Update every parameter that has a gradient."""
        assert closure is None, "a closure would need gradients of its own"
        self.create_state()
        for parameter, group in self._matrices():
            if parameter.grad is not None:
                self._update(parameter, group)
        if self._adamw is not None:
            self._adamw.step()

    def _matrices(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        return [(p, group) for group in self.param_groups if group["algorithm"] == "muon" for p in group["params"]]

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        gradient, average = parameter.grad, self.state[parameter]["momentum_buffer"]
        assert gradient is not None
        average.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
        # torch's optimizer on zeros, without momentum and decay, leaves the update of whole matrices.
        matrix: Matrix = group["matrix"]
        wholes = matrix.gathered(direction)
        updates = [nn.Parameter(torch.zeros_like(whole)) for whole in wholes]
        for update, whole in zip(updates, wholes):
            update.grad = whole
        torch.optim.Muon(
            updates,
            lr=group["lr"],
            weight_decay=0.0,
            momentum=0.0,
            nesterov=False,
            ns_steps=group["ns_steps"],
            adjust_lr_fn=group["adjust_lr_fn"],
        ).step()
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(matrix.sharded([update.detach() for update in updates], parameter))
