"""The layers that benchmarks/moe.py compares, all with the same weights, as functions of `[1, tokens, hidden]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import polyshard as ps

HIDDEN, SIZE, PER_TOKEN, TOKENS = 576, 192, 8, 1024


@dataclass(frozen=True)
class Contestant:
    """A layer.

    Attributes:
        module: with the parameters.
        call: `[1, tokens, hidden] -> [1, tokens, hidden]`.
    """

    module: nn.Module
    call: Callable[[torch.Tensor], torch.Tensor]

    def step(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Run forward and backward."""
        for parameter in self.module.parameters():
            parameter.grad = None
        self.call(x.detach().requires_grad_()).backward(weight)

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """Run forward only."""
        with torch.no_grad():
            return self.call(x)


def weights(experts: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Return `[experts, hidden]` of the router, and `[experts, out, in]` of gate and up, and of down."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((experts, HIDDEN), (experts, 2 * SIZE, HIDDEN), (experts, HIDDEN, SIZE))
    drawn = [torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for shape in shapes]
    return [weight.to(device, dtype) for weight in drawn]


def of_polyshard(context: ps.ParallelContext, values: list[torch.Tensor]) -> Contestant:
    """Return `ps.mixture_of_experts` on the layers of the context's library."""
    router, gate_up, down = values
    layer = ps.mixture_of_experts(HIDDEN, SIZE, len(router), PER_TOKEN, context, router=ps.Router(normalize=True))
    layer = layer.to(context.device, router.dtype)
    axis = context.axis("expert")
    mine = slice(axis.rank * len(layer.experts.gate_up), (axis.rank + 1) * len(layer.experts.gate_up))
    copied = {layer.gate.weight: router, layer.experts.gate_up: gate_up[mine], layer.experts.down: down[mine]}
    with torch.no_grad():
        for target, source in copied.items():
            target.copy_(source)
    return Contestant(layer, layer)


def of_transformers(values: list[torch.Tensor]) -> Contestant:
    """Return `Qwen3MoeSparseMoeBlock` with grouped matmuls, the default of models that are loaded."""
    router = values[0]
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": SIZE, "num_experts": len(router)}
    config = transformers.Qwen3MoeConfig(**sizes, num_experts_per_tok=PER_TOKEN, norm_topk_prob=True)
    config._experts_implementation = "grouped_mm"
    block = Qwen3MoeSparseMoeBlock(config).to(router.device, router.dtype)
    with torch.no_grad():
        for target, source in zip((block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj), values):
            target.copy_(source)
    return Contestant(block, lambda x: _first(block(x)))


def of_megatron(values: list[torch.Tensor]) -> Contestant:
    """Return Megatron-Core's `MoELayer` with its own router, on one rank; it needs a GPU, and substitutes on a CPU."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    router, gate_up, down = values
    if not torch.cuda.is_available():
        moe_utils.te_general_gemm = None
        torch.cuda.current_device = lambda: torch.device("cpu")
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    config = TransformerConfig(
        num_layers=1,
        num_attention_heads=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=SIZE,
        moe_ffn_hidden_size=SIZE,
        num_moe_experts=len(router),
        moe_router_topk=PER_TOKEN,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",  # on one rank, neither dispatcher communicates
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        moe_permute_fusion=False,
        use_cpu_initialization=True,
        params_dtype=router.dtype,
    )
    names = ("tp", "cp", "tp_cp", "ep", "expt_tp", "tp_ep", "tp_dp_cp", "expt_dp")
    groups = ProcessGroupCollection(**dict.fromkeys(names, dist.group.WORLD))
    products = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layer = MoELayer(
        config,
        MoESubmodules(experts=ModuleSpec(SequentialMLP, submodules=products)),
        layer_number=1,
        pg_collection=groups,
    ).to(router.device, router.dtype)
    with torch.no_grad():
        layer.router.weight.copy_(router)
        for expert, first, second in zip(layer.experts.local_experts, gate_up, down):
            expert.linear_fc1.weight.copy_(first)
            expert.linear_fc2.weight.copy_(second)
    return Contestant(layer, lambda x: layer(x.transpose(0, 1))[0].transpose(0, 1))


def of_deepspeed(values: list[torch.Tensor]) -> Contestant:
    """Return the layer by which DeepSpeed's AutoEP replaces transformers' block, on one rank."""
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig

    block = of_transformers(values).module
    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=SIZE,
        num_experts=len(values[0]),
        num_experts_per_tok=PER_TOKEN,
        norm_topk_prob=True,
    )
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.Module()])
    model.model.layers[0].mlp = block
    model.config = config
    auto = AutoEP(model, AutoEPConfig(enabled=True, autoep_size=1, preset_model="qwen3_moe"))
    for spec in auto.ep_parser():
        auto.replace_moe_layer(spec, ep_size=1, ep_rank=0)
    layer: Any = model.model.layers[0].mlp
    layer.set_deepspeed_parallelism()
    return Contestant(layer, lambda x: _first(layer(x)))


BY_HAND = SimpleNamespace(megatron=of_megatron, deepspeed=of_deepspeed)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
