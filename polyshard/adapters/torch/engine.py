"""torch's own training engines: DistributedDataParallel and FSDP2 (`fully_shard`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from polyshard.adapters.shared import optimizer_state
from polyshard.adapters.shared.devices import check_devices
from polyshard.adapters.shared.grad_norm import check_max_grad_norm
from polyshard.adapters.shared.weights import check_shard
from polyshard.adapters.torch.clip import clip_gradients, global_grad_norm
from polyshard.adapters.torch.compat import (
    fsdp_function,
    full_tensor,
    is_dtensor,
    sharded_rows,
    unshard_gradient_sync,
)
from polyshard.core.adapter import OptimizerFactory, StepResult
from polyshard.core.batch import BatchResult, CountTokens, MicroBatch, SumLoss
from polyshard.core.context import ParallelContext, replica_axis
from polyshard.core.errors import ConfigurationError
from polyshard.core.pieces import WEIGHT, OptimizerState, Piece, held_alike
from polyshard.core.weight_table import collect_layouts
from polyshard.training.batch import train_batch
from polyshard.training.generators import GeneratorCheck

logger = logging.getLogger(__name__)


class TorchEngine:
    """`TrainingEngine` on DDP or FSDP2, over the replicas; tensor parallelism is the model's own.

    Args:
        model: as its factory built it with `context`.
        optimizer: makes the optimizer from named parameters, once they are wrapped.
        context: where this process stands.
        data_parallel: `"ddp"` (replicated) or `"fsdp"` (parameters, gradients and optimizer states sharded).
        max_grad_norm: clip the whole model's gradient to this norm; None does not clip.
        check_random: compare random generators over the ranks before the first update, in one small all-reduce per axis
            of several ranks; see `polyshard.manual_seed`.
        shard_modules: for FSDP2, which modules to gather one at a time; default: the items of every ModuleList.

    Raises:
        ConfigurationError: an unknown `data_parallel`, or a norm that is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        context: ParallelContext,
        *,
        data_parallel: Literal["ddp", "fsdp"] = "ddp",
        max_grad_norm: float | None = 1.0,
        check_random: bool = True,
        shard_modules: Callable[[nn.Module], bool] | None = None,
    ) -> None:
        if data_parallel not in ("ddp", "fsdp"):
            raise ConfigurationError(f"data_parallel must be 'ddp' or 'fsdp', got {data_parallel!r}")
        check_max_grad_norm(max_grad_norm)
        self.context = context
        self.updates = 0
        check_devices(model, context)
        self.table = collect_layouts(model)  # before wrapping
        self._guard = context.guard
        self._max_grad_norm = max_grad_norm
        self._sharded = data_parallel == "fsdp" and replica_axis(context).size > 1
        if data_parallel == "fsdp" and not self._sharded:
            logger.warning("fsdp does nothing at data-parallel size 1: the model is trained unsharded")
        self._module = model
        self._generators = GeneratorCheck(model, context, check_random)
        self._wrapped: nn.Module = model
        if self._sharded:
            _fully_shard(model, context, shard_modules or _is_list_item(model))
        elif replica_axis(context).size > 1:
            with self._guard("data parallel setup"):
                self._wrapped = DistributedDataParallel(
                    model, process_group=replica_axis(context).group, gradient_as_bucket_view=True
                )
        self.optimizer = optimizer(model.named_parameters())

    @property
    def module(self) -> nn.Module:
        """The model as the factory built it."""
        return self._module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        with self._guard("data forward"), self._generators.watching():
            return self._wrapped(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients, averaged over the replicas."""
        with self._guard("data backward"):
            loss.backward()

    def train_batch(
        self, micro_batches: Sequence[MicroBatch], loss: SumLoss | None = None, tokens: CountTokens | None = None
    ) -> BatchResult:
        """Forward and backward of one step's micro-batches, weighted by tokens; see `polyshard.training.batch`."""
        return train_batch(self, self.context, micro_batches, loss, tokens)

    def step(self) -> StepResult:
        """Clip, update, clear. A gradient that is not finite leaves the weights as they are, with a warning."""
        with self._guard("data step"):
            self._generators.compare()
            norm = global_grad_norm(self._module.named_parameters(), self.table, self.context)
        value = float(norm)
        finite = value == value and value != float("inf")
        if finite:
            self.updates += 1  # before the update: an error in it may leave weights changed
            if self._max_grad_norm is not None:
                clip_gradients(self._module.parameters(), norm, self._max_grad_norm)
            self.optimizer.step()
        else:
            logger.warning("gradient norm is %s: this step is skipped", value)
        self.zero_grad()
        return StepResult(grad_norm=value, skipped=not finite)

    def zero_grad(self) -> None:
        """Forget accumulated gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, lr: float) -> None:
        """For the next step on."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def accumulate(self) -> AbstractContextManager[None]:
        """Around all micro-batches but the last."""
        if isinstance(self._wrapped, DistributedDataParallel):
            return self._wrapped.no_sync()
        return self._without_sync() if self._sharded else nullcontext()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names as built, and tensor-parallel shards gathered over the replicas."""
        for name, parameter in self._module.named_parameters():
            with self._guard("data gather of weights"):
                yield name, full_tensor(parameter.detach())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Set parameters from tensor-parallel shards."""
        self.updates += 1
        parameters = dict(self._module.named_parameters())
        with torch.no_grad():
            for name, value in weights:
                parameter = parameters[name]
                check_shard(name, value, tuple(parameter.shape))
                parameter.copy_(_like(value, parameter))

    def weight_pieces(self) -> Iterator[Piece]:
        """This rank's run of every parameter."""
        for name, parameter in self._module.named_parameters():
            yield self._piece(name, WEIGHT, parameter.detach())

    def weights_written(self) -> None:
        """The pieces are the parameters: nothing to refresh."""
        self.updates += 1

    def optimizer_state(self) -> OptimizerState:
        """The optimizer's own tensors."""
        optimizer_state.materialize(self.optimizer)
        pieces = [
            self._piece(name, slot, value)
            for name, parameter in self._module.named_parameters()
            for slot, value in optimizer_state.slots(self.optimizer, parameter).items()
        ]
        return optimizer_state.state(self.optimizer, self.optimizer, pieces)

    def optimizer_written(self, step: int, lr: float) -> None:
        """Go on from update `step`."""
        optimizer_state.set_step(self.optimizer, step)
        self.set_learning_rate(lr)

    def _piece(self, name: str, slot: str, tensor: Any) -> Piece:
        if is_dtensor(tensor):
            start, local = sharded_rows(tensor)
            return Piece(parameter=name, slot=slot, start=start, values=local.view(-1))
        return held_alike(name, slot, tensor, replica_axis(self.context))

    def close(self) -> None:
        """Drop the wrapper's hold on the process group."""
        self._wrapped = self._module

    @contextmanager
    def _without_sync(self) -> Iterator[None]:
        unshard_gradient_sync(self._module, False)
        try:
            yield
        finally:
            unshard_gradient_sync(self._module, True)


def _is_list_item(model: nn.Module) -> Callable[[nn.Module], bool]:
    items = {id(item) for module in model.modules() if isinstance(module, nn.ModuleList) for item in module}
    return lambda module: id(module) in items


def _fully_shard(model: nn.Module, context: ParallelContext, chosen: Callable[[nn.Module], bool]) -> None:
    from torch.distributed.device_mesh import DeviceMesh

    fully_shard = fsdp_function()
    group = replica_axis(context).group
    assert group is not None
    mesh = DeviceMesh.from_group(group, context.device.type)
    for module in reversed(list(model.modules())):
        if module is not model and chosen(module):
            fully_shard(module, mesh=mesh)
    # The root's own weights (embedding, head, last norm) stay gathered between forward and backward. Its other methods
    # must not be registered with register_fsdp_forward_method: when forward calls them, FSDP2 frees the weights that
    # its backward still needs, and the process dies in it (torch 2.13).
    fully_shard(model, mesh=mesh)


def _like(value: torch.Tensor, parameter: Any) -> Any:
    if not is_dtensor(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    where = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), *where, src_data_rank=None)
