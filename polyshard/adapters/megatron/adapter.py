"""The Megatron-Core adapter: its capabilities and entry points."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import nn

from polyshard.adapters.megatron.context import adopt
from polyshard.adapters.megatron.linear import MegatronLinearAdapter
from polyshard.adapters.shared.base_adapter import BaseAdapter
from polyshard.convert.format import CheckpointFormat
from polyshard.core.adapter import OptimizerFactory
from polyshard.core.capabilities import YES, Capabilities, Support, no
from polyshard.core.context import GroupContext, ParallelContext
from polyshard.core.parallel_layout import ParallelLayout
from polyshard.core.requirement import Requirement

if TYPE_CHECKING:
    from polyshard.adapters.megatron.engine import MegatronEngine
    from polyshard.adapters.megatron.experts_compat import TokenDispatcher

CAPABILITIES = Capabilities(
    "megatron",
    {
        "tensor": YES,
        "sequence": YES,
        "data": YES,
        "fsdp": no("notimpl", "Megatron's own FSDP is not wired up"),
        "zero1": YES,
        "zero2": no("never", "Megatron's optimizer shards at stage 1; beyond that it has its FSDP"),
        "zero3": no("never", "Megatron's optimizer shards at stage 1; beyond that it has its FSDP"),
        "pipeline": YES,
        "context": YES,
        "expert": Support(
            True,
            "its SequentialMLP and dispatchers for SwiGLU experts, torch's experts for others",
            without=("float16",),
        ),
        "casts": no("never", "Megatron keeps masters of bfloat16 parameters instead"),
        "masters": YES,
        "float16": YES,
        "float8": no("notimpl", "Megatron computes in float8 in Transformer Engine's layers, which are not wired up"),
        "optimizers": no("never", "Megatron creates its own optimizer: AdamW, or at stage 0 SGD"),
        "offload": no(
            "notimpl", "its HybridDeviceOptimizer needs a GPU, and keeps state where no checkpoint finds it yet"
        ),
        "compile": YES,
        "lora": YES,
        "cpu": YES,
        "cuda": YES,
        "training": YES,
        "serving": YES,
    },
)


REQUIREMENT = Requirement(
    title="Megatron-Core",
    module="megatron.core",
    distributions=("megatron-core",),
    tested=("0.16.1", "0.19.2"),
    supported=">=0.16,<0.20",
    install="pip install 'polyshard[megatron]'",
)


class MegatronAdapter(BaseAdapter):
    """The `Adapter` of Megatron-Core.

    Examples:
        >>> adapter = ps.load_adapter("megatron")
        >>> adapter.capabilities["zero1"].available, adapter.capabilities["zero3"].available
        (True, False)
        >>> [checkpoint_format.name for checkpoint_format in adapter.formats]
        ['megatron-torch-dist', 'megatron-legacy']
    """

    name = "megatron"
    capabilities = CAPABILITIES
    requirement = REQUIREMENT
    pipeline_schedules = ("1f1b", "interleaved-1f1b")  # plans read this and the next
    copies_logits = True  # its loss works in place

    def __init__(self) -> None:
        self.linear = MegatronLinearAdapter()

    def initialize(
        self, layout: ParallelLayout | None = None, *, token_dispatcher: TokenDispatcher = "alltoall", **options: Any
    ) -> GroupContext:
        """Create process groups as the torch adapter does, for Megatron-Core's layers.

        Args:
            layout: the parallel layout; by default data parallel over all ranks.
            token_dispatcher: how experts exchange tokens; see `MegatronLinearAdapter`.
            options: options of the torch adapter.
        """
        linear = MegatronLinearAdapter(token_dispatcher)
        return dataclasses.replace(super().initialize(layout, **options), linear=linear)

    def adopt(self, context: ParallelContext) -> GroupContext:
        """Return a context with Megatron-Core's layers on the process groups of `context`."""
        self.requirement.require()
        return adopt(context, self.linear)

    def engine(
        self, model: nn.Module, optimizer: OptimizerFactory, context: ParallelContext, **options: Any
    ) -> MegatronEngine:
        """Return Megatron's DDP and optimizer around `model`; the options are those of `MegatronEngine`."""
        from polyshard.adapters.megatron.engine import MegatronEngine

        if options.pop("offload", "none") != "none":
            self.capabilities.require("offload")
        return MegatronEngine(model, optimizer, context, **options)

    @property
    def formats(self) -> tuple[CheckpointFormat, ...]:
        """The checkpoint formats of the library; reading them does not require Megatron."""
        from polyshard.adapters.megatron.dist_format import MegatronDistFormat
        from polyshard.adapters.megatron.legacy_format import MegatronLegacyFormat

        return (MegatronDistFormat(), MegatronLegacyFormat())
