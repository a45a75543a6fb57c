"""The parallel context in a vLLM worker: vLLM's process groups and paged attention, with any adapter's layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from polyshard.adapters.vllm.attention.latent import latent_factory
from polyshard.adapters.vllm.attention.layer import paged_attention_factory
from polyshard.adapters.vllm.compat import VllmConfig, allow_amx, get_pp_group, get_pp_indices, get_tp_group
from polyshard.adapters.vllm.exact import exact_serving
from polyshard.adapters.vllm.layers.linear import VllmLinearAdapter
from polyshard.adapters.vllm.layers.wrapped import PackedLinearAdapter
from polyshard.core.context import GroupContext, ParallelAxis
from polyshard.core.discovery import load_adapter
from polyshard.core.parallel_layout import Axis, ParallelLayout
from polyshard.core.serving import RegisteredModel


@dataclass(frozen=True, slots=True)
class VllmCollectives:
    """`Collectives` of a vLLM group coordinator: custom all-reduce on GPUs, shared memory on CPU."""

    group: Any

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Return the elementwise `sum` or `max` over the group."""
        if op == "sum":
            # On CPU vLLM reduces in place (cpu_communicator.py), but `Collectives` must not change the input.
            return self.group.all_reduce(tensor.clone() if tensor.device.type == "cpu" else tensor)
        result = tensor.clone()
        torch.distributed.all_reduce(result, op=torch.distributed.ReduceOp.MAX, group=self.group.device_group)
        return result

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the concatenation along `dim`."""
        return self.group.all_gather(tensor.contiguous(), dim)

    def reduce_scatter(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's part, along `dim`, of the sum."""
        return self.group.reduce_scatter(tensor.contiguous(), dim)


def serving_context(vllm_config: VllmConfig, registered: RegisteredModel) -> GroupContext:
    """Return the context of this worker, with the layers of the registered adapter (`"vllm"`: vLLM's own).

    In exact mode every adapter's layers use the same matmul. Their weights belong to another library's layers, so
    `"vllm"` means torch's layers there.
    """
    allow_amx()
    adapter = "torch" if registered.exact and registered.adapter == "vllm" else registered.adapter
    axes: dict[Axis, ParallelAxis] = {}
    for name, group in (("tensor", get_tp_group()), ("pipeline", get_pp_group())):
        axes[name] = ParallelAxis(
            name=name,
            ranks=tuple(group.ranks),
            rank=group.rank_in_group,
            group=group.device_group,
            collectives=VllmCollectives(group) if group.world_size > 1 else None,
        )
    chosen = load_adapter(adapter)
    context = GroupContext(
        layout=ParallelLayout(tensor=axes["tensor"].size, pipeline=axes["pipeline"].size),
        device=torch.get_default_device(),
        linear=VllmLinearAdapter(quantized=True) if vllm_config.quant_config is not None else chosen.linear,
        axes=axes,
        rank=axes["tensor"].ranks[axes["tensor"].rank],
        attention=paged_attention_factory(vllm_config, exact=registered.exact),
        latent_attention=latent_factory(vllm_config, registered.exact),
        pipeline_layers=get_pp_indices,
        initialize_weights=False,
    )
    if adapter == "vllm":
        return context
    chosen.capabilities.require("serving")
    adopted = chosen.adopt(context)
    assert isinstance(adopted, GroupContext)
    if registered.exact:
        return exact_serving(adopted, registered, vllm_config)
    if adopted.device.type != "cpu" or not getattr(adopted.linear, "plain_products", False):
        return adopted
    return replace(adopted, linear=PackedLinearAdapter(adopted.linear, adopted.axis("tensor")))
