"""The DeepSpeed adapter: its capabilities and entry points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from polyshard.adapters.deepspeed.context import adopt
from polyshard.adapters.deepspeed.linear import DeepspeedLinearAdapter
from polyshard.adapters.shared.base_adapter import BaseAdapter
from polyshard.convert.format import CheckpointFormat
from polyshard.core.adapter import OptimizerFactory
from polyshard.core.capabilities import YES, Capabilities, Support, no
from polyshard.core.context import GroupContext, ParallelContext
from polyshard.core.requirement import Requirement

if TYPE_CHECKING:
    from polyshard.adapters.deepspeed.engine import DeepspeedEngine

CAPABILITIES = Capabilities(
    "deepspeed",
    {
        "tensor": YES,
        "sequence": no("notyet", "the layers of DeepSpeed's automatic tensor parallelism have no sequence parallel"),
        "data": YES,
        "fsdp": no("never", "DeepSpeed's equivalent is ZeRO stage 3. Use zero3"),
        "zero1": YES,
        "zero2": YES,
        "zero3": YES,
        "pipeline": Support(True, "its PipelineEngine, with ZeRO stages 0 and 1", without=("zero2", "zero3")),
        "context": YES,
        "expert": Support(
            True,
            "experts and exchange of its AutoEP for SwiGLU experts, torch's experts for others",
            without=("zero3",),
        ),
        "casts": YES,
        "masters": Support(True, "of ZeRO stages 1 to 3", without=("data",)),
        "float16": no("notyet", "its loss scaling does not run on CPU, and has not been tested on CUDA"),
        "float8": no("notyet", "the layers of DeepSpeed's automatic tensor parallelism have no float8"),
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
    title="DeepSpeed",
    module="deepspeed",
    distributions=("deepspeed",),
    tested=("0.19.8",),
    supported=">=0.19,<0.20",
    install="pip install 'polyshard[deepspeed]'",
)


class DeepspeedAdapter(BaseAdapter):
    """The `Adapter` of DeepSpeed.

    Examples:
        >>> adapter = ps.load_adapter("deepspeed")
        >>> [name for name in ("zero1", "zero2", "zero3") if adapter.capabilities[name].available]
        ['zero1', 'zero2', 'zero3']
        >>> adapter.capabilities["fsdp"].reason
        "DeepSpeed's equivalent is ZeRO stage 3. Use zero3"
    """

    name = "deepspeed"
    capabilities = CAPABILITIES
    requirement = REQUIREMENT
    zero_bucket = 500_000_000  # DeepSpeed's default reduce_bucket_size, in elements; plans of memory read it

    def __init__(self) -> None:
        self.linear = DeepspeedLinearAdapter()

    def adopt(self, context: ParallelContext) -> GroupContext:
        """Return a context with DeepSpeed's layers on the process groups of `context`."""
        self.requirement.require()
        return adopt(context, self.linear)

    def engine(
        self, model: nn.Module, optimizer: OptimizerFactory, context: ParallelContext, **options: Any
    ) -> DeepspeedEngine:
        """Return DeepSpeed's ZeRO engine around `model`; the options are those of `DeepspeedEngine`."""
        from polyshard.adapters.deepspeed.engine import DeepspeedEngine

        return DeepspeedEngine(model, optimizer, context, **options)

    @property
    def formats(self) -> tuple[CheckpointFormat, ...]:
        """The checkpoint formats of the library; detecting them does not require DeepSpeed."""
        from polyshard.adapters.deepspeed.formats import DeepspeedFormat, DeepspeedUniversalFormat

        return (DeepspeedFormat(), DeepspeedUniversalFormat())
