"""The torch adapter: its capabilities and entry points."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import nn

from polyshard.adapters.shared.groups import group_context
from polyshard.adapters.torch.context import DEFAULT_TIMEOUT, initialize, world_size_from_environment
from polyshard.adapters.torch.engine import TorchEngine
from polyshard.adapters.torch.linear import TorchLinearAdapter
from polyshard.convert.format import CheckpointFormat
from polyshard.core.adapter import OptimizerFactory
from polyshard.core.capabilities import YES, Capabilities, no
from polyshard.core.context import GroupContext, ParallelContext
from polyshard.core.parallel_layout import ParallelLayout
from polyshard.core.pipeline_plan import SCHEDULES
from polyshard.core.requirement import Requirement
from polyshard.core.shutdown import shut_down

logger = logging.getLogger(__name__)

CAPABILITIES = Capabilities(
    "torch",
    {
        "tensor": YES,
        "sequence": YES,
        "data": YES,
        "fsdp": YES,
        "zero1": no("never", "torch's ZeroRedundancyOptimizer is superseded by FSDP2. Use fsdp"),
        "zero2": no("never", "FSDP2 with reshard_after_forward=False is equivalent. Use fsdp"),
        "zero3": no("never", "FSDP2 is equivalent. Use fsdp"),
        "pipeline": YES,
        "context": YES,
        "expert": YES,
        "casts": YES,
        "masters": YES,
        "float16": YES,
        "float8": YES,
        "optimizers": YES,
        "offload": YES,
        "compile": YES,
        "lora": YES,
        "cpu": YES,
        "cuda": YES,
        "training": YES,
        "serving": YES,
    },
)


REQUIREMENT = Requirement(
    title="torch",
    module="torch",
    distributions=("torch",),
    tested=("2.11.0", "2.13.0", "2.14.1"),
    supported=">=2.11,<2.15",
    install="pip install torch",
)


class TorchAdapter:
    """The `Adapter` of plain torch.

    Examples:
        >>> adapter = ps.load_adapter("torch")
        >>> context = adapter.initialize()  # without torchrun, a context of one process
        >>> model = ps.column_parallel(4, 2, context)
        >>> engine = adapter.engine(model, ps.AdamW(lr=0.1), context)
        >>> engine.backward(model(torch.ones(1, 4)).sum())
        >>> engine.step().skipped
        False
    """

    name = "torch"
    capabilities = CAPABILITIES
    requirement = REQUIREMENT
    pipeline_schedules = SCHEDULES  # plans read it

    def __init__(self) -> None:
        self.linear = TorchLinearAdapter()

    def initialize(
        self,
        layout: ParallelLayout | None = None,
        *,
        device: str | torch.device | None = None,
        backend: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> GroupContext:
        """Create process groups from torchrun's environment, or a context of one process without it.

        Args:
            layout: the parallel layout; by default data parallel over all ranks.
            device: by default this rank's GPU, else the CPU.
            backend: `nccl` or `gloo`; see `context.initialize`.
            timeout: seconds after which waiting for another rank raises an error that names it.
        """
        self.requirement.require()
        layout = layout or ParallelLayout.for_world(world_size_from_environment())
        context = initialize(layout, self.linear, device=device, backend=backend, timeout=timeout)
        if layout.sequence_parallel and layout.tensor == 1 and context.rank == 0:
            logger.warning("sequence_parallel does nothing at tensor-parallel size 1")
        return context

    def adopt(self, context: ParallelContext) -> GroupContext:
        """Return a context with torch's layers on the process groups of `context`."""
        return dataclasses.replace(group_context(context), linear=self.linear)

    def engine(
        self, model: nn.Module, optimizer: OptimizerFactory, context: ParallelContext, **options: Any
    ) -> TorchEngine:
        """Return DDP or FSDP2 around `model`; the options are those of `TorchEngine`."""
        return TorchEngine(model, optimizer, context, **options)

    @property
    def formats(self) -> tuple[CheckpointFormat, ...]:
        """The checkpoint formats of the library."""
        from polyshard.adapters.torch.dcp_format import DcpFormat

        return (DcpFormat(),)

    def shutdown(self, context: ParallelContext) -> None:
        """Wait for all ranks, then destroy the process groups that `initialize` created."""
        shut_down(context)
