"""The FairScale adapter: its capabilities and entry points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from polyshard.adapters.fairscale.context import adopt
from polyshard.adapters.fairscale.linear import FairscaleLinearAdapter
from polyshard.adapters.fairscale.zero_elements import zero_elements
from polyshard.adapters.shared.base_adapter import BaseAdapter
from polyshard.convert.format import CheckpointFormat
from polyshard.core.adapter import OptimizerFactory
from polyshard.core.capabilities import YES, Capabilities, Support, no
from polyshard.core.context import GroupContext, ParallelContext
from polyshard.core.pipeline_plan import SCHEDULES
from polyshard.core.requirement import Requirement

if TYPE_CHECKING:
    from polyshard.adapters.fairscale.engine import FairscaleEngine

CAPABILITIES = Capabilities(
    "fairscale",
    {
        "tensor": YES,
        "sequence": no("never", "FairScale has no sequence-parallel layers, and is no longer developed"),
        "data": Support(True, "always with OSS, which shards the optimizer states (zero1)"),
        "fsdp": no("never", "FullyShardedDataParallel needs CUDA streams; torch's FSDP2 has replaced it"),
        "zero1": YES,
        "zero2": YES,
        "zero3": no("never", "FairScale's stage 3 is its FullyShardedDataParallel"),
        "pipeline": Support(True, "torch's schedules, with OSS", without=("zero2",)),
        "context": YES,
        "expert": Support(
            True, "torch's experts, with OSS over the ranks that hold the same ones; its own MOELayer has a capacity"
        ),
        "casts": YES,
        "masters": Support(True, "gradients are reduced in bfloat16, so Precision needs reduce=torch.bfloat16"),
        "float16": YES,
        "float8": no("never", "FairScale has no float8, and is no longer developed"),
        "optimizers": YES,
        "offload": no("never", "OSS keeps the state on the device of the parameters"),
        "compile": YES,
        "lora": YES,
        "cpu": YES,
        "cuda": YES,
        "training": YES,
        "serving": YES,
    },
)


REQUIREMENT = Requirement(
    title="FairScale",
    module="fairscale",
    distributions=("fairscale",),
    tested=("0.4.13",),
    supported=">=0.4.13,<0.5",
    install="pip install 'polyshard[fairscale]'",
)


class FairscaleAdapter(BaseAdapter):
    """The `Adapter` of FairScale.

    Examples:
        >>> adapter = ps.load_adapter("fairscale")
        >>> [checkpoint_format.name for checkpoint_format in adapter.formats]
        ['llama']
        >>> adapter.capabilities["sequence"].reason
        'FairScale has no sequence-parallel layers, and is no longer developed'
    """

    name = "fairscale"
    capabilities = CAPABILITIES
    requirement = REQUIREMENT
    pipeline_schedules = SCHEDULES  # plans read it
    least_sharding = "zero1"  # the engine always has OSS; plans read this and the three below
    reduces_as_stored = True  # DDP and ShardedDataParallel reduce gradients in their dtype
    zero_elements = staticmethod(zero_elements)
    copies_logits = True  # its loss works in place

    def __init__(self) -> None:
        self.linear = FairscaleLinearAdapter()

    def adopt(self, context: ParallelContext) -> GroupContext:
        """Return a context with FairScale's layers on the process groups of `context`."""
        self.requirement.require()
        return adopt(context, self.linear)

    def engine(
        self, model: nn.Module, optimizer: OptimizerFactory, context: ParallelContext, **options: Any
    ) -> FairscaleEngine:
        """Return OSS with ShardedDataParallel or DDP around `model`; the options are those of `FairscaleEngine`."""
        from polyshard.adapters.fairscale.engine import FairscaleEngine

        if options.pop("offload", "none") != "none":
            self.capabilities.require("offload")
        return FairscaleEngine(model, optimizer, context, **options)

    @property
    def formats(self) -> tuple[CheckpointFormat, ...]:
        """The checkpoint formats of the library; reading them does not require FairScale."""
        from polyshard.adapters.fairscale.llama_format import LlamaFormat

        return (LlamaFormat(),)
