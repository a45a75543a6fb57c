"""Strategies: everything that is chosen for a run, and the adapters that can run it, by their capabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import torch

from polyshard.core.capabilities import Capabilities
from polyshard.core.errors import ConfigurationError
from polyshard.core.parallel_layout import ParallelLayout
from polyshard.core.pipeline_plan import Schedule
from polyshard.core.precision import Precision
from polyshard.training.recompute import Mode

Sharding = Literal["data", "zero1", "zero2", "zero3", "fsdp"]
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)

MASTERS = Precision(parameters=torch.bfloat16)
CASTS = Precision(compute=torch.bfloat16)
PRECISIONS: Mapping[str, Precision] = {"masters": MASTERS, "casts": CASTS, "float32": Precision()}

_SMALLEST_CONTEXT = 2048  # tokens that a rank of the context axis keeps


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One way to distribute a training step.

    Attributes:
        layout: sizes of the axes.
        sharding: what the replicas share: a feature of `Capabilities`, `"data"` (nothing) to `"zero3"` and `"fsdp"`.
        precision: dtypes of the run.
        recompute: activations that are computed again.
        rows: sequences of a micro-batch.
        micro_batches: micro-batches of a step on each rank.
        stages_per_rank: pipeline stages of each rank; of more than one, the schedule is interleaved 1F1B.

    Examples:
        >>> strategy = Strategy(layout=ps.ParallelLayout(tensor=2, data=4), sharding="zero1")
        >>> strategy.features(), str(strategy)
        (('training', 'tensor', 'zero1', 'masters'), 't2 d4, zero1, recompute none')
    """

    layout: ParallelLayout
    sharding: Sharding = "data"
    precision: Precision = MASTERS
    recompute: Mode = "none"
    rows: int = 1
    micro_batches: int = 1
    stages_per_rank: int = 1

    @property
    def schedule(self) -> Schedule:
        """The schedule of the pipeline."""
        return "1f1b" if self.stages_per_rank == 1 else "interleaved-1f1b"

    @property
    def sizes(self) -> str:
        """The sizes of the axes in short, with the stages of a rank: `t8 p16 v2 d64`."""
        text = sizes(self.layout)
        stages = f"p{self.layout.pipeline}"
        return text if self.stages_per_rank == 1 else text.replace(stages, f"{stages} v{self.stages_per_rank}", 1)

    @property
    def dtypes(self) -> str:
        """The name of the precision, and the dtype of the reduction if it is not the usual one: `masters`."""
        precision = self.precision
        name = "casts" if precision.casts else "masters" if precision.has_masters else _dtype(precision.parameters)
        usual = precision.reduce in (torch.float32, precision.optimizer)
        return name if usual else f"{name}, reduce {_dtype(precision.reduce)}"

    @property
    def replicas(self) -> int:
        """The number of ranks that hold the same weights."""
        return self.layout.data * self.layout.context

    def features(self) -> tuple[str, ...]:
        """Return the features of `Capabilities` that the strategy needs."""
        layout, precision = self.layout, self.precision
        sized = [axis for axis in ("tensor", "pipeline", "context", "expert") if getattr(layout, axis) > 1]
        wanted = {
            "sequence": layout.sequence_parallel,
            self.sharding: self.replicas > 1,
            "casts": precision.casts,
            "masters": precision.has_masters,
            "float16": precision.scales_loss,
        }
        return ("training", *sized, *(feature for feature, needed in wanted.items() if needed))

    def __str__(self) -> str:
        return f"{self.sizes}, {self.sharding}, recompute {self.recompute}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_NAMES = {"t": "tensor", "c": "context", "p": "pipeline", "e": "expert", "d": "data"}
LETTERS = f"Sizes: {', '.join(f'{letter} {name}' for letter, name in _NAMES.items())}, sp sequence parallel"
LETTERS += ", v stages per pipeline rank"


def sizes(layout: ParallelLayout) -> str:
    """Return the sizes of axes in short.

    Examples:
        >>> sizes(ParallelLayout(tensor=8, data=128, sequence_parallel=True))
        't8 d128 sp'
    """
    parts = [f"{letter}{size}" for letter, name in _NAMES.items() if (size := getattr(layout, name)) > 1]
    return " ".join([*(parts or ["1"]), *(["sp"] if layout.sequence_parallel else [])])


def reason_against(strategy: Strategy, capabilities: Capabilities, schedules: Sequence[str] = ("1f1b",)) -> str | None:
    """Return the feature that an adapter lacks for a strategy, with its reason, or None.

    Args:
        strategy: the strategy.
        capabilities: of the adapter.
        schedules: the adapter's pipeline schedules.
    """
    wanted = strategy.features()
    for feature in wanted:
        support = capabilities[feature]
        if not support.available:
            return f"{feature}: {support.reason}"
        for other in support.without:
            if other in wanted:
                return f"{feature}: not with {other}"
    if strategy.layout.pipeline > 1 and strategy.schedule not in schedules:
        return f"{strategy.schedule}: its pipelines run {', '.join(schedules)}"
    return None


def impossible(strategy: Strategy) -> str | None:
    """Return why no adapter will run a strategy, or why it cannot be planned, or None."""
    gathers = strategy.sharding == "fsdp" and strategy.replicas > 1
    if gathers and strategy.precision.has_masters:
        return "FSDP2 keeps no masters of bfloat16 parameters"
    if strategy.precision.casts and not gathers:
        return "casts by torch.autocast are not planned, since some of their activations are float32"
    return None


def strategies(
    gpus: int,
    tokens_per_step: int,
    length: int,
    *,
    layers: int,
    experts: int,
    axes: Iterable[str],
    max_tensor: int,
    rows: Sequence[int],
    shardings: Sequence[Sharding],
    precisions: Sequence[Precision],
    recompute: Sequence[Mode],
    stages_per_rank: Sequence[int] = (1,),
    refuse: Callable[[str], None] = lambda _: None,
) -> Iterator[Strategy]:
    """Yield every strategy whose sizes divide the GPUs, the step and the sequence.

    Args:
        gpus: number of ranks.
        tokens_per_step: tokens of all ranks and micro-batches of a step.
        length: tokens of a sequence.
        layers: of the model; the largest pipeline size.
        experts: of a layer; 0 without.
        axes: the axes that may have several ranks, besides data.
        max_tensor: largest tensor-parallel size.
        rows: sequences of a micro-batch.
        shardings: see `Strategy`.
        precisions: see `Strategy`.
        recompute: see `Strategy`.
        stages_per_rank: see `Strategy`; more than one need a number of micro-batches that the pipeline size divides.
        refuse: called for each strategy whose replicas do not divide the step.

    Raises:
        ConfigurationError: the step is not a whole number of sequences, or a number is not positive.
    """
    numbers = {"sequence_length": (length,), "rows": rows, "stages_per_rank": stages_per_rank}
    for name, given in numbers.items():
        if not given or min(given) < 1:
            raise ConfigurationError(f"{name} is invalid: got {', '.join(map(str, given))}, expected at least 1.")
    sequences, rest = divmod(tokens_per_step, length)
    if rest or not sequences:
        raise ConfigurationError(
            f"tokens_per_step is invalid: got {tokens_per_step}, expected a multiple of the sequence length {length}."
        )
    axes = set(axes)
    longest = max(1, length // _SMALLEST_CONTEXT)
    tensors = [n for n in divisors(gpus) if n == 1 or ("tensor" in axes and n <= max_tensor)]
    contexts = [n for n in divisors(gpus) if n == 1 or ("context" in axes and n <= longest)]
    stages = [n for n in divisors(gpus) if n == 1 or ("pipeline" in axes and n <= layers)]
    for tensor, context, pipeline in product(tensors, contexts, stages):
        if gpus % (tensor * context * pipeline):
            continue
        data = gpus // (tensor * context * pipeline)
        groups = [n for n in divisors(data) if n == 1 or ("expert" in axes and experts and experts % n == 0)]
        for expert, sequence in product(groups, (False, True) if tensor > 1 and "sequence" in axes else (False,)):
            layout = ParallelLayout(
                tensor=tensor, context=context, pipeline=pipeline, data=data, expert=expert, sequence_parallel=sequence
            )
            several = [n for n in stages_per_rank if n == 1 or 1 < pipeline * n <= layers * (pipeline > 1)]
            options = product(shardings, precisions, recompute, rows, several)
            for sharding, precision, mode, count, virtual in options:
                micro_batches, rest = divmod(sequences, data * count)
                if rest or not micro_batches:
                    refuse(f"the replicas do not divide the {sequences} sequences of a step into equal micro-batches")
                elif virtual == 1 or micro_batches % pipeline == 0:
                    yield Strategy(
                        layout=layout,
                        sharding=sharding,
                        precision=precision,
                        recompute=mode,
                        rows=count,
                        micro_batches=micro_batches,
                        stages_per_rank=virtual,
                    )


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
