"""Sharding of a model, or of pipeline stages, by FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import nn

from polyshard.adapters.torch.compat import fsdp_function, is_dtensor, mixed_precision_policy, offload_policy
from polyshard.adapters.torch.overlap import FsdpOptions
from polyshard.core.context import ParallelContext, replica_axis
from polyshard.core.errors import ConfigurationError
from polyshard.core.pipeline_plan import SPLIT_BACKWARD
from polyshard.core.precision import Precision
from polyshard.core.ranks import Ranks
from polyshard.core.stages import Stages
from polyshard.experts.observed import is_router_bias
from polyshard.training.muon import MuonWithAdamW


def is_list_item(model: nn.Module) -> Callable[[nn.Module], bool]:
    """Return whether a module is an item of one of the model's ModuleLists."""
    items = {id(item) for module in model.modules() if isinstance(module, nn.ModuleList) for item in module}
    return lambda module: id(module) in items


def fully_shard_model(
    model: nn.Module,
    context: ParallelContext,
    chosen: Callable[[nn.Module], bool],
    precision: Precision,
    options: FsdpOptions,
    offloads: bool,
    experts: Set[nn.Parameter],
) -> None:
    """Shard a model over the replicas: the modules that `chosen` selects one by one, and the rest together.

    Args:
        model: the model, or a stage of it.
        context: the parallel context.
        chosen: selects modules.
        precision: dtypes of the run.
        options: of FSDP2.
        offloads: whether shards stay on the CPU.
        experts: parameters that are distributed over the expert axis. They are sharded over the ranks that hold the
            same experts.
    """
    from torch.distributed.device_mesh import DeviceMesh

    fully_shard = partial(
        fsdp_function(),
        mp_policy=mixed_precision_policy(
            precision.compute_dtype if precision.casts else None,
            precision.reduce if precision.reduce != precision.parameters or precision.casts else None,
        ),
        **({"offload_policy": offload_policy(context.device)} if offloads else {}),
    )
    group = replica_axis(context).group
    assert group is not None
    mesh = DeviceMesh.from_group(group, context.device.type)
    # A router's correction bias must stay float32, and FSDP2 would cast it with the others.
    ignored = {parameter for name, parameter in model.named_parameters() if is_router_bias(name)}
    banks = [module for module in model.modules() if any(p in experts for p in module.parameters(recurse=False))]
    holders = context.axis("expert_replica").group
    if holders is None:
        ignored.update(experts)
    elif banks:
        expert_mesh = DeviceMesh.from_group(holders, context.device.type)
        for bank in banks:
            fully_shard(bank, mesh=expert_mesh, reshard_after_forward=options.reshard_after_forward)
    fully_shard = partial(fully_shard, ignored_params=ignored)
    modules = [module for module in model.modules() if module is not model and chosen(module)]
    for module in reversed(modules):
        fully_shard(module, mesh=mesh, reshard_after_forward=options.reshard_after_forward)
    options.prefetch(modules)
    # The root's own weights (embedding, head, final norm) stay gathered between forward and backward. Its other methods
    # must not be registered with register_fsdp_forward_method: when forward calls them, FSDP2 frees weights that the
    # backward pass still needs, and the process crashes (torch 2.13).
    fully_shard(model, mesh=mesh)


def fully_shard_stages(
    stages: Stages,
    modules: Sequence[nn.Module],
    context: ParallelContext,
    shard_modules: Callable[[nn.Module], bool] | None,
    precision: Precision,
    options: FsdpOptions,
    offloads: bool,
    experts: Set[nn.Parameter],
) -> None:
    """Shard each pipeline stage over the replicas. A collective.

    Args:
        stages: of this rank.
        modules: what the schedule calls, one for each stage.
        context: the parallel context.
        shard_modules: as in `TorchEngine`.
        precision: dtypes of the run.
        options: of FSDP2.
        offloads: whether shards stay on the CPU.
        experts: as in `fully_shard_model`.

    Raises:
        ConfigurationError: the schedule cannot be combined with `shard_modules`, with a shared weight, or with experts
            of which several ranks hold the same.
    """
    schedule = stages.plan.schedule
    splits = schedule in SPLIT_BACKWARD
    if splits and shard_modules is not None:
        raise ConfigurationError(
            f"shard_modules is unsupported with {schedule}: FSDP2's hooks of single blocks do not run when gradients "
            "of weights are computed separately, and the gradients would be wrong. Remove it, and each stage is "
            "gathered as a whole, or use 1f1b."
        )
    error = None
    if sum(len(list(stage.parameters())) for stage in stages) > len(list(stages.parameters())):
        error = ConfigurationError(
            f"FSDP2 cannot shard a weight that two pipeline stages of a rank share, as {schedule} does with tied "
            "embeddings. Use data_parallel='ddp', or 1f1b."
        )
    if splits and experts and context.axis("expert_replica").size > 1:
        error = ConfigurationError(
            f"FSDP2 cannot shard experts with {schedule}: their hooks do not run when gradients of weights are "
            "computed separately. Use data_parallel='ddp', or 1f1b, or an expert-parallel size at which no two ranks "
            f"hold the same experts: got {context.axis('expert').size} for {replica_axis(context).size} replicas."
        )
    Ranks.of(context).raise_on_all(error, "the stages cannot be sharded", ConfigurationError)
    for module in modules:
        chosen = (lambda _: False) if splits else shard_modules or is_list_item(module)
        fully_shard_model(module, context, chosen, precision, options, offloads, experts)


def separate_dtensors(optimizer: torch.optim.Optimizer) -> None:
    """Split each parameter group that has both DTensors and tensors, which torch's fused kernels do not take together.

    Experts that a single rank holds are no DTensors: they are not sharded any further.
    """
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        sharded = [parameter for parameter in group["params"] if is_dtensor(parameter)]
        others = [parameter for parameter in group["params"] if not is_dtensor(parameter)]
        if sharded and others:
            groups += [{**group, "params": sharded}, {**group, "params": others}]
        else:
            groups.append(group)
    optimizer.param_groups[:] = groups
    if isinstance(optimizer, MuonWithAdamW) and optimizer.adamw is not None:
        optimizer.adamw.param_groups[:] = [group for group in groups if group["algorithm"] == "adamw"]
