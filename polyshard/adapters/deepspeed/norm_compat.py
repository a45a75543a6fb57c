"""All code of gradient norms that depends on the version of DeepSpeed, for 0.19."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from polyshard.adapters.deepspeed.compat import deepspeed

CountedParts = Callable[[str, torch.Tensor, int], list[torch.Tensor]]


def skip_infinite_gradients(optimizer: Any) -> None:
    """Let ZeRO 1 to 3 skip a step whose gradient norm is not finite, in bfloat16 as well (engine.py, 0.19.8).

    ZeRO 1 and 2 look at the norm after a pass over all gradients and two all-reduces that find the same: they are left
    out.
    """
    optimizer.check_grad_overflow = True
    if getattr(optimizer, "compute_grad_norm", False):
        optimizer.check_overflow = lambda partition_gradients=True: None


def count_gradients(
    optimizer: Any, stage: int, named: Mapping[str, torch.nn.Parameter], parts: CountedParts, groups: Sequence[Any]
) -> None:
    """Let the gradient norm of ZeRO 1 to 3 count each logical element once.

    DeepSpeed tells shards from copies by an attribute of the parameter (stage_1_and_2.py, get_grad_norm_direct), and no
    attribute says that a part of a parameter is a copy, such as a KV head that tensor-parallel ranks share.

    Args:
        optimizer: ZeRO's.
        stage: 1 to 3.
        named: the model's parameters.
        parts: `(name, values, start) -> the views of a run of the flattened shard that count on this rank`.
        groups: process groups that the norm is summed over; the data axis first, None for an axis of one rank.
    """
    names = {id(parameter): name for name, parameter in named.items()}

    def runs(gradients: Any, parameters: Any) -> Iterator[tuple[str, torch.Tensor, int]]:
        """Yield name, flattened gradient and its start in the shard for each parameter of a partition."""
        real = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        rank = torch.distributed.get_rank(groups[0]) if groups[0] is not None else 0
        group = -1 if stage == 3 else next(i for i, p in enumerate(optimizer.params_in_partition) if p is parameters)
        for index, (gradient, parameter) in enumerate(zip(real, parameters)):
            if stage == 3:
                start = rank * parameter.ds_tensor.numel()
            else:  # only the first parameter of a partition may begin in another one
                start = optimizer.first_offset[group] if index == 0 else 0
            yield names[id(parameter)], gradient.reshape(-1), start

    def offloaded_runs(parameters: Any) -> Iterator[tuple[str, torch.Tensor, int]]:
        """Yield the same for gradients that ZeRO-Offload has copied to the CPU, beside the fp32 partitions."""
        rank = torch.distributed.get_rank(groups[0]) if groups[0] is not None else 0
        for parameter in parameters:
            place = optimizer.grad_position.get(optimizer.get_param_id(parameter))
            if place is None:
                continue
            group, to, count = place[0], place[-2], place[-1]
            start = rank * parameter.ds_tensor.numel() if stage == 3 else place[1]
            partitions = (
                optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
            )
            if partitions[group].grad is not None:
                yield names[id(parameter)], partitions[group].grad.view(-1)[to : to + count], start

    def norm_of(found: Iterable[tuple[str, torch.Tensor, int]]) -> torch.Tensor:
        squares = [
            torch.linalg.vector_norm(part, dtype=torch.float32).square() for run in found for part in parts(*run)
        ]
        device = deepspeed.accelerator.get_accelerator().current_device_name()
        total = torch.stack(squares).sum().to(device) if squares else torch.zeros((), device=device)
        for group in groups:
            if group is not None and torch.distributed.get_world_size(group) > 1:
                torch.distributed.all_reduce(total, group=group)
        total = total.sqrt()
        return torch.where(total.isfinite(), total, -1.0)  # DeepSpeed's mark of a norm that is not finite

    def norm_of_group(gradients: Any, parameters: Any, norm_type: float = 2) -> torch.Tensor:
        assert norm_type == 2
        return norm_of(runs(gradients, parameters))

    def norm_of_all(norm_type: float = 2) -> torch.Tensor:
        """Return the norm over all parameter groups, of which pipeline stages may have different numbers."""
        assert norm_type == 2
        found = (
            run
            for index, parameters in enumerate(optimizer.params_in_partition)
            for run in (
                offloaded_runs(parameters)
                if optimizer.cpu_offload
                else runs(optimizer.averaged_gradients[index], parameters)
            )
        )
        return norm_of(found).to(optimizer.device)  # gradients are on the CPU if the optimizer is offloaded

    if stage < 3:
        optimizer.scaled_global_norm = norm_of_all
        return
    optimizer.complete_grad_norm_calculation_for_cpu_offload = lambda parameters: norm_of(
        offloaded_runs(parameters)
    ).cpu()
    optimizer.get_grad_norm_direct = norm_of_group
