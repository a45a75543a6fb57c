"""The result of planning: frozen data, which the command line prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from polyshard.planning.cluster import Cluster
from polyshard.planning.compute import StepTime
from polyshard.planning.memory import Memory
from polyshard.planning.serving import ServingPlan
from polyshard.planning.strategy import Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayout:
    """One strategy with its figures, those of the rank or stage that needs the most.

    Attributes:
        strategy: what is distributed, and how.
        adapters: that can run it by their capabilities; empty if none can.
        memory: bytes of a rank by kind.
        sent: bytes that a rank sends in a step, by axis.
        flops: executed FLOPs of a rank in a step, recomputation included.
        model_flops: FLOPs of the model in a step, on all ranks.
        time: predicted seconds of a step by part.
        utilization: model FLOPs per second, as a fraction of the peak of all GPUs (MFU).

    Examples:
        >>> config = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160,
        ...           "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-5}
        >>> cluster = ps.Cluster(gpus=2, memory=80 * 2**30)
        >>> found = ps.plan(
        ...     config, cluster=cluster, tokens_per_step=512, sequence_length=256, recompute=("full",),
        ...     adapters=["fairscale"],
        ... )
        >>> best = found.layouts[0]
        >>> best.memory.total > best.memory.optimizer > 0, best.model_flops > 0
        (True, True)
    """

    strategy: Strategy
    adapters: tuple[str, ...]
    memory: Memory
    sent: Mapping[str, float]
    flops: int
    model_flops: int
    time: StepTime
    utilization: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The layouts of a model on a cluster.

    Attributes:
        cluster: the machines and the efficiencies that the predicted times assume.
        parameters: of the full model.
        layouts: those that fit into memory, the fastest first.
        too_large: those that do not fit, the smallest first.
        refused: why other layouts are impossible, each with the number of strategies.
        serving: how the model can be served; empty unless requested.
        notes: what the plan leaves out.

    Examples:
        >>> config = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160,
        ...           "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-5}
        >>> cluster = ps.Cluster(gpus=2, memory=80 * 2**30)
        >>> found = ps.plan(
        ...     config, cluster=cluster, tokens_per_step=512, sequence_length=256, recompute=("full",),
        ...     adapters=["fairscale"],
        ... )
        >>> sorted({planned.strategy.layout.tensor for planned in found.layouts})
        [1, 2]
        >>> [reason for reason in found.refused if reason.startswith("fairscale: sequence")]
        ['fairscale: sequence: FairScale has no sequence-parallel layers, and is no longer developed']
    """

    cluster: Cluster
    parameters: int
    layouts: tuple[PlannedLayout, ...]
    too_large: tuple[PlannedLayout, ...]
    refused: Mapping[str, int]
    serving: tuple[ServingPlan, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as data that JSON can hold."""
        return {
            "cluster": asdict(self.cluster),
            "parameters": self.parameters,
            "layouts": [_layout(found) for found in self.layouts],
            "too_large": [_layout(found) for found in self.too_large],
            "refused": dict(self.refused),
            "serving": [{**asdict(found), "fits": found.fits} for found in self.serving],
            "notes": list(self.notes),
        }


def _layout(found: PlannedLayout) -> dict[str, Any]:
    strategy = found.strategy
    dtypes = {name: str(getattr(strategy.precision, name)).removeprefix("torch.") for name in ("parameters", "reduce")}
    return {
        **asdict(strategy.layout),
        "sharding": strategy.sharding,
        "recompute": strategy.recompute,
        "rows": strategy.rows,
        "micro_batches": strategy.micro_batches,
        "stages_per_rank": strategy.stages_per_rank,
        "precision": {**dtypes, "compute": str(strategy.precision.compute_dtype).removeprefix("torch.")},
        "adapters": list(found.adapters),
        "memory": {**asdict(found.memory), "total": found.memory.total},
        "bytes_sent": dict(found.sent),
        "flops": found.flops,
        "model_flops": found.model_flops,
        "seconds": {**asdict(found.time), "total": found.time.total, "bottleneck": found.time.bottleneck},
        "utilization": found.utilization,
    }
