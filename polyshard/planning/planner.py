"""`plan`: every layout of a model on a cluster, with its memory, communication and predicted time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from polyshard.config.fields import config_fields
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError, LayoutError
from polyshard.core.parallel_layout import ParallelLayout
from polyshard.core.precision import Precision
from polyshard.planning import decoder
from polyshard.planning.cluster import Cluster
from polyshard.planning.communication import payload_of, sent_of
from polyshard.planning.compute import step_time
from polyshard.planning.experts import expert_parameters
from polyshard.planning.library import Library
from polyshard.planning.memory import Memory, memory_of
from polyshard.planning.result import Plan, PlannedLayout
from polyshard.planning.serving import serving_plans
from polyshard.planning.shapes import ShapeCache
from polyshard.planning.strategy import (
    CASTS,
    MASTERS,
    SHARDINGS,
    Sharding,
    Strategy,
    impossible,
    strategies,
)
from polyshard.planning.trace import Trace, build, joined, record, sizes_of
from polyshard.planning.training_adapters import TrainingAdapter, reasons_against_axis, training_adapters
from polyshard.training.recompute import Mode

Factory = Callable[[Any, ParallelContext], nn.Module]
Traces = dict[Any, Any]  # recorded micro-batches by sizes, and the reasons why others are impossible
_AXES = ("tensor", "sequence", "context", "pipeline", "expert")


def plan(
    config: Any,
    *,
    cluster: Cluster,
    tokens_per_step: int,
    sequence_length: int,
    factory: Factory | None = None,
    adapters: Sequence[str] | None = None,
    unsupported: bool = False,
    layout: ParallelLayout | None = None,
    rows: Sequence[int] = (1,),
    shardings: Sequence[Sharding] = SHARDINGS,
    precisions: Sequence[Precision] = (MASTERS, CASTS),
    recompute: Sequence[Mode] = ("none", "selective", "full"),
    stages_per_rank: Sequence[int] = (1, 2),
    serve: int = 0,
    traces: Traces | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Plan a training run: which layouts fit into memory, what they communicate, and how fast they are.

    The factory is built on the meta device at each planned size, and one micro-batch of a rank is recorded. Memory,
    FLOPs and bytes are those of the recorded operations. Predicted times rest on the efficiencies in `cluster`.

    Args:
        config: of the model: the factory's first argument.
        cluster: the machines.
        tokens_per_step: tokens of a step, over all ranks and micro-batches.
        sequence_length: tokens of a sequence.
        factory: builds the model; by default one for configs of the Llama, Qwen, Mistral, Mixtral and DeepSeek-V3
            families.
        adapters: names of adapters; by default all that train.
        unsupported: also plan layouts that no adapter can run yet; their `adapters` are empty.
        layout: plan this layout only.
        rows: numbers of sequences of a micro-batch.
        shardings: what the replicas share: `"data"` (nothing), `"zero1"` to `"zero3"`, `"fsdp"`.
        precisions: dtypes; by default bfloat16 with masters, and float32 parameters cast to bfloat16.
        recompute: modes of recomputation.
        stages_per_rank: numbers of pipeline stages on each rank; of more than one, the schedule is interleaved 1F1B.
        serve: GPUs that serve the model; 0 for none.
        traces: filled with what is recorded; pass it again to plan the same model and sequence length for another
            cluster in less time.
        progress: called with each layout before it is recorded.

    Raises:
        ConfigurationError: the model cannot be planned, or the step is not a whole number of sequences.

    Examples:
        >>> from polyshard.planning import Cluster
        >>> config = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        ...           "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-5}
        >>> found = ps.plan(
        ...     config, cluster=Cluster(gpus=8, memory=80 * 2**30), tokens_per_step=2**16, sequence_length=4096,
        ...     shardings=("fsdp",), recompute=("full",), layout=ps.ParallelLayout(data=8)
        ... )
        >>> found.parameters, found.layouts[0].adapters
        (6738415616, ('torch',))
    """
    if serve < 0:
        raise ConfigurationError(f"serve is invalid: got {serve}, expected a number of GPUs, or 0.")
    fields = config_fields(config)
    given = factory is not None
    planner = _Planner(
        config=config,
        factory=factory or decoder.planned_decoder,
        length=sequence_length,
        cluster=cluster,
        adapters=training_adapters(adapters),
        unsupported=unsupported,
        progress=progress or (lambda _: None),
        traces={} if traces is None else traces,
    )
    parameters, layers, sparse = planner.full_model()
    able = {axis for a in planner.adapters.values() for axis in _AXES if a.capabilities[axis].available}
    axes = [axis for axis in _AXES if unsupported or axis in able]
    for axis in _AXES:
        if axis not in axes:
            planner.refused.update(reasons_against_axis(axis, planner.adapters))
    candidates = strategies(
        cluster.gpus,
        tokens_per_step,
        sequence_length,
        layers=layers,
        experts=decoder.number_of_experts(fields) if sparse else 0,
        axes=axes,
        max_tensor=cluster.gpus_per_node,
        rows=rows,
        shardings=shardings,
        precisions=precisions,
        recompute=recompute,
        stages_per_rank=stages_per_rank,
        refuse=planner.refuse,
    )
    chosen = [s for s in candidates if layout is None or s.layout == layout]
    if layout is not None and not chosen:
        raise ConfigurationError(
            f"{layout} is impossible: expected {cluster.gpus} ranks, axes that adapters support ({', '.join(axes)}), "
            "and at least one micro-batch. Pass unsupported=True for layouts that no adapter can run yet."
        )
    found = [planned for s in _without_duplicates(chosen) for planned in planner.planned(s)]
    fits = [planned for planned in found if planned.memory.total <= cluster.memory]
    serving = serving_plans(planner.factory, config, serve, sequence_length, cluster, planner.refuse) if serve else ()
    return Plan(
        cluster=cluster,
        parameters=parameters,
        layouts=tuple(sorted(fits, key=lambda planned: planned.time.total)),
        too_large=tuple(
            sorted((p for p in found if p.memory.total > cluster.memory), key=lambda planned: planned.memory.total)
        ),
        refused=dict(planner.refused),
        serving=serving,
        notes=() if given else tuple(decoder.left_out(fields)),
    )


@dataclass(eq=False)
class _Planner:
    config: Any
    factory: Factory
    length: int
    cluster: Cluster
    adapters: dict[str, TrainingAdapter]
    unsupported: bool
    progress: Callable[[str], None]
    traces: Traces
    refused: Counter[str] = field(default_factory=Counter)
    shapes: ShapeCache = field(default_factory=ShapeCache)
    _planned: set[tuple[str, Strategy]] = field(default_factory=set)  # by adapter, in the precision in which it runs

    def refuse(self, reason: str) -> None:
        self.refused[reason] += 1

    def full_model(self) -> tuple[int, int, bool]:
        """Return the number of parameters, of blocks in the longest list of them, and whether there are experts."""
        if "full" not in self.traces:
            full = build(self.factory, self.config, ParallelLayout(), torch.bfloat16)
            blocks = max((len(part) for part in full.modules() if isinstance(part, nn.ModuleList)), default=1)
            sparse = any(True for _ in expert_parameters(full))
            self.traces["full"] = sum(p.numel() for p in full.parameters()), blocks, sparse
        return self.traces["full"]

    def planned(self, strategy: Strategy) -> list[PlannedLayout]:
        """Return the figures of a strategy, one for the adapters with equal precision and memory."""
        if (reason := impossible(strategy)) is not None:
            self.refuse(reason)
            return []
        reasons = {name: adapter.reason_against(strategy) for name, adapter in self.adapters.items()}
        able = tuple(name for name, reason in reasons.items() if reason is None)
        if not able and not self.unsupported:
            self.refused.update({f"{name}: {reason}" for name, reason in reasons.items()})
            return []
        try:
            stages = self._stages(strategy)
        except LayoutError as error:
            self.refuse(str(error))
            return []
        groups: dict[tuple[Strategy, Memory], list[str]] = {}
        for name in able or ("",):
            library = self.adapters[name].library if name else Library()
            run = library.strategy(strategy)
            if (name, run) in self._planned:
                continue  # of another precision, in which the library does not run
            self._planned.add((name, run))
            memories = (memory_of(run, trace, stage, self.cluster.reserve, library) for stage, trace in stages)
            groups.setdefault((run, max(memories, key=lambda memory: memory.total)), []).append(name)
        return [self._figures(run, stages, memory, tuple(filter(None, n))) for (run, memory), n in groups.items()]

    def _figures(
        self, strategy: Strategy, stages: list[tuple[int, Trace]], memory: Memory, names: tuple[str, ...]
    ) -> PlannedLayout:
        slowest = max((trace for _, trace in stages), key=lambda trace: trace.flops.total)
        payload = payload_of(strategy, slowest)
        time = step_time(strategy, slowest, payload, memory, self.cluster)
        model_flops = self._model_flops(strategy)
        return PlannedLayout(
            strategy=strategy,
            adapters=names,
            memory=memory,
            sent=sent_of(strategy, payload),
            flops=slowest.flops.total * strategy.micro_batches,
            model_flops=model_flops,
            time=time,
            utilization=model_flops / (time.total * self.cluster.gpus * self.cluster.peak_flops),
        )

    def _stages(self, strategy: Strategy) -> list[tuple[int, Trace]]:
        """Return the traces of the first, the second and the last pipeline rank; others equal the second."""
        layout, several = strategy.layout, strategy.stages_per_rank
        if layout.pipeline == 1:
            return [(0, self._trace(strategy, 0, None)[0])]
        # A rank's stages are placed in a loop: stage s is on rank s modulo the number of ranks.
        every = replace(strategy, layout=replace(layout, pipeline=layout.pipeline * several))
        first, hidden = self._trace(every, 0, None)
        self._check_stages(layout, first)
        last, middle = layout.pipeline * several - 1, self._trace(every, 1, hidden)[0]
        ends = {0: first, layout.pipeline - 1: self._trace(every, last, hidden)[0]}
        ranks = sorted({0, 1, layout.pipeline - 1})
        return [(rank, joined([ends.get(rank, middle), *[middle] * (several - 1)])) for rank in ranks]

    def _check_stages(self, layout: ParallelLayout, first: Trace) -> None:
        full = self._sizes(replace(layout, pipeline=1))
        if first.sizes.trainable >= full:
            raise LayoutError(
                "the factory builds the full model on each pipeline stage. Build only the layers of "
                "polyshard.pipeline_stage(num_layers, parallel_context)"
            )

    def _sizes(self, layout: ParallelLayout) -> int:
        key = ("sizes", layout.tensor, layout.expert)
        if key not in self.traces:
            single = ParallelLayout(tensor=layout.tensor, expert=layout.expert, data=layout.expert)
            self.traces[key] = sizes_of(build(self.factory, self.config, single, torch.bfloat16)).trainable
        return self.traces[key]

    def _trace(self, strategy: Strategy, stage: int, hidden: torch.Size | None) -> tuple[Trace, torch.Size]:
        layout, dtype = strategy.layout, strategy.precision.compute_dtype
        sizes = (layout.tensor, layout.context, layout.pipeline, layout.expert, layout.sequence_parallel)
        key = (*sizes, dtype, strategy.recompute, strategy.rows, stage)
        if key not in self.traces:
            self.progress(str(strategy))
            # The number of replicas changes no shape: one for each rank of the expert axis is enough.
            alone = replace(layout, data=layout.expert)
            options: dict[str, Any] = {"rows": strategy.rows, "length": self.length, "recompute": strategy.recompute}
            try:
                self.traces[key] = record(
                    self.factory,
                    self.config,
                    alone,
                    dtype=dtype,
                    stage=stage,
                    hidden=hidden,
                    shapes=self.shapes,
                    **options,
                )
            except (LayoutError, ConfigurationError) as error:
                self.traces[key] = str(error)
        found = self.traces[key]
        if isinstance(found, str):
            raise LayoutError(found)
        return found

    def _model_flops(self, strategy: Strategy) -> int:
        """Return the FLOPs of a step without recomputation, on all ranks."""
        plain = replace(strategy, recompute="none")
        layout = strategy.layout
        if layout.pipeline > 1:
            plain = replace(plain, layout=replace(layout, pipeline=1))
        trace, _ = self._trace(plain, 0, None)
        return trace.flops.total * layout.tensor * layout.context * layout.data * strategy.micro_batches


def _without_duplicates(chosen: Iterable[Strategy]) -> Iterable[Strategy]:
    """Return the strategies in order, each once: a single replica shares nothing with others."""
    return dict.fromkeys(replace(s, sharding="data") if s.replicas == 1 else s for s in chosen)
