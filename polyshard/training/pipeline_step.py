"""One training step of a pipeline: what each stage computes of each micro-batch, whatever library runs the schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from polyshard.core.batch import BatchResult, CountTokens, MicroBatch, SumLoss
from polyshard.core.context import ParallelContext, replica_axis
from polyshard.core.errors import ConfigurationError
from polyshard.core.serving import forward_takes
from polyshard.core.stages import Stages
from polyshard.experts.observed import expert_layers
from polyshard.experts.stage_loss import add_router_loss
from polyshard.experts.step_routing import StepRouting, on_padded_tokens
from polyshard.training.padding import pad_arguments, padded_shape, unpadded
from polyshard.training.pipeline_agreement import agree_over_pipeline
from polyshard.training.prepared import attempt, check_default_labels
from polyshard.training.train_batch import (
    balanced_tokens,
    check_functions,
    check_micro_batches,
    check_summed,
    counted_tokens,
    lm_loss_of,
    total_tokens,
)

Computing = Callable[[], AbstractContextManager[Any]]


class PipelineStep:
    """The micro-batches of one step, as the stages of this rank compute them.

    An engine makes its library's schedule call `forward` for each stage and micro-batch, and `loss` after the last
    stage. Every rank of a pipeline has all micro-batches, so that only hidden states travel between stages.

    Args:
        stages: this rank's stages.
        context: the parallel context.
        micro_batches: of this step; see `polyshard.train_batch`. They must contain `input_ids`.
        loss: as in `polyshard.train_batch`; called on the ranks of the last stage only.
        tokens: as in `polyshard.train_batch`.
        computing: enters the dtype of computation.
        scaled: applies the factor of a float16 run to a loss, as the library does to the share of a micro-batch.
        fixed_shapes: pad micro-batches of unequal length to one shape, by tokens that no loss counts.
        interrupted: called with an error that ends the schedule before its end.
        vocab_size: of the head, against which labels of the default loss are checked; None if it is unknown.

    Raises:
        ConfigurationError: as `polyshard.train_batch`; or the ranks of a pipeline have different micro-batches, or a
            micro-batch cannot be padded.
        RankFailureError: another rank has raised an error before the schedule.
    """

    def __init__(
        self,
        stages: Stages,
        context: ParallelContext,
        micro_batches: Sequence[MicroBatch],
        loss: SumLoss | None = None,
        tokens: CountTokens | None = None,
        *,
        computing: Computing = nullcontext,
        scaled: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
        fixed_shapes: bool = False,
        interrupted: Callable[[Exception], None] = lambda error: None,
        vocab_size: int | None = None,
    ) -> None:
        self._stages, self._context, self._computing, self._scaled = stages, context, computing, scaled
        self._interrupted = interrupted
        self._micro_batches: list[MicroBatch] = []
        self._arguments: list[dict[str, Any]] = []
        self._shape: tuple[int, ...] | None = None
        self._experts = [layer for _, layer in expert_layers(stages)]
        for layer in self._experts:
            layer.observed.counted = None  # a step that failed has left its own
        self._routing = StepRouting(stages, self._fit)
        headless = (
            loss is None and stages.last is not None and not callable(getattr(stages.last, "compute_logits", None))
        )
        # An error of this rank is raised after collectives that tell it to the other stages, and to other pipelines.
        found, error = attempt(lambda: self._prepare(micro_batches, loss, tokens, fixed_shapes, vocab_size))
        counted = found or []
        replays = self._routing.replays
        replayed, error = agree_over_pipeline(self._micro_batches, counted, headless, replays, error, context)
        self.tokens = total_tokens(counted, context, error)
        self._balanced = balanced_tokens(counted, stages, context)
        # Engines average over the replicas, so the sum is multiplied by their number.
        self._factor = replica_axis(context).size / self.tokens.clamp_min(1.0)
        self._sums = torch.zeros((), dtype=torch.float64, device=context.device)
        if replayed:
            self._routing.check_over_pipeline([self._tokens(index) for index in range(len(self))], context)
        self._loss = lm_loss_of(stages.last, context) if loss is None and stages.last is not None else loss

    def _prepare(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: SumLoss | None,
        tokens: CountTokens | None,
        fixed_shapes: bool,
        vocab_size: int | None,
    ) -> list[torch.Tensor]:
        """Check and pad the micro-batches, without communication; return the numbers of tokens that count."""
        check_micro_batches(micro_batches)
        check_functions(loss, tokens)
        for micro_batch in micro_batches:
            if not isinstance(micro_batch.get("input_ids"), torch.Tensor):
                raise ConfigurationError(
                    f"a micro-batch of a pipeline has no input_ids: got {', '.join(micro_batch)}. Later stages get it "
                    "beside the hidden states."
                )
        self._micro_batches = list(micro_batches)
        counted = counted_tokens(micro_batches, tokens, self._context)
        if loss is None and self._stages.last is not None:
            check_default_labels(micro_batches, vocab_size)
        self._arguments = [
            {name: value for name, value in micro_batch.items() if name != "labels"} for micro_batch in micro_batches
        ]
        if fixed_shapes:
            shapes = [arguments["input_ids"].shape for arguments in self._arguments]
            self._shape = padded_shape(shapes, self._context, loss is not None)
        if self._shape is not None:
            self._arguments = [pad_arguments(arguments, self._shape) for arguments in self._arguments]
            self._check_balance()
        return counted

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the library's schedule inside this context, which names a rank that fails."""
        try:
            with self._context.guard("pipeline schedule"):
                yield
        except Exception as error:
            self._interrupted(error)
            raise

    def __len__(self) -> int:
        return len(self._micro_batches)

    def input_ids(self, index: int) -> torch.Tensor:
        """Return the token IDs of a micro-batch as the first stage gets them, padded if shapes are fixed."""
        return self._arguments[index]["input_ids"]

    def select(self, index: int) -> None:
        """Prepare the experts of all stages for a micro-batch: what they replay, and which tokens are padding.

        `forward` does it. Call it before the backward pass of a micro-batch, which may recompute the forward pass.
        """
        self._routing.select(index)
        if self._shape is not None and self._experts:
            _, own = self._counted(index)
            for layer in self._experts:
                layer.observed.counted = own

    def _counted(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which padded tokens of a micro-batch count, `[tokens]`: all tokens', and this rank's."""
        assert self._shape is not None
        counted = torch.zeros(self._shape, dtype=torch.bool, device=self._context.device)
        counted[tuple(slice(0, size) for size in self._micro_batches[index]["input_ids"].shape)] = True
        return counted.reshape(-1), self._own(counted).reshape(-1)

    def _own(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of what belongs to tokens, `[batch, seq]` or `[tokens]`."""
        axis = self._context.axis("tensor")
        return tokens.tensor_split(axis.size, dim=-1)[axis.rank] if self._context.layout.sequence_parallel else tokens

    def _tokens(self, index: int) -> tuple[int, int]:
        """Return the number of tokens of a micro-batch, and how many of them are this rank's."""
        if self._shape is not None:
            everywhere, own = self._counted(index)
            return int(everywhere.sum()), int(own.sum())
        ids = self._arguments[index]["input_ids"]
        return ids.numel(), self._own(ids).numel()

    def _fit(self, experts: torch.Tensor, index: int) -> torch.Tensor:
        return experts if self._shape is None else on_padded_tokens(experts, *self._counted(index))

    def _check_balance(self) -> None:
        balanced = any(layer.balance.has_loss for layer in self._experts)
        if balanced and self._context.layout.sequence_parallel and self._context.axis("tensor").size > 1:
            raise ConfigurationError(
                "micro-batches of a pipeline have different shapes under sequence parallel: expected one shape for "
                "balance losses, which are means over this rank's tokens. Pad them, or use no sequence parallel."
            )

    def forward(self, stage: nn.Module, number: int, index: int, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Run a stage's forward pass on a micro-batch. Balance losses of its experts are added to the step's loss.

        Args:
            stage: one of this rank's stages, or a library's wrapper of it.
            number: its number over all stages.
            index: of the micro-batch.
            hidden: the output of the stage before; ignored by the first stage.

        Returns:
            The stage's output: hidden states; of the last stage, what its `forward` returns.

        Raises:
            ConfigurationError: the model's `forward` does not take `inputs_embeds`.
        """
        arguments = self._arguments[index]
        if number > 0:
            arguments = {**arguments, "inputs_embeds": hidden}
        self.select(index)
        with self._computing():
            output = stage(**arguments)
        if not self._experts:
            return output
        self._routing.collect(index)
        if self._routing.replays and output.grad_fn is not None:
            output.grad_fn.register_prehook(lambda _: self.select(index))  # the backward pass may recompute this
        return add_router_loss(output, stage, lambda loss: self._scaled(loss * self._share(index, loss)))

    def _share(self, index: int, mean: torch.Tensor) -> torch.Tensor:
        """Return the factor of a mean over the tokens of a micro-batch in the step's loss."""
        return (self._balanced[index] * self._factor).to(mean.dtype)

    def loss(self, index: int, output: torch.Tensor) -> torch.Tensor:
        """Return the share of a micro-batch in the step's loss, a scalar to run the backward pass on.

        The gradients of all micro-batches must be added up, and then averaged over the replicas.

        Args:
            index: of the micro-batch.
            output: of the last stage.
        """
        assert self._loss is not None
        if self._shape is not None:
            original = self._micro_batches[index]["input_ids"].shape
            output, micro_batch = unpadded(output, self._micro_batches[index], original, self._shape)
        else:
            micro_batch = self._micro_batches[index]
        with self._computing():
            value = self._loss(output, micro_batch)
        check_summed(value)
        self._sums += value.detach().double()
        return value * self._factor.to(value.dtype)

    def result(self) -> BatchResult:
        """Return the loss of all micro-batches and replicas on every rank. A collective, after the schedule."""
        for layer in self._experts:
            layer.observed.counted = None  # outside of a pipeline step all tokens count
        self._routing.end()
        summed, replicas, pipeline = self._sums, replica_axis(self._context), self._context.axis("pipeline")
        if self._stages.last is not None and replicas.size > 1:  # the other stages are still in their backward passes
            assert replicas.collectives is not None
            summed = replicas.collectives.all_reduce(summed)
        if pipeline.size > 1:
            assert pipeline.collectives is not None
            summed = pipeline.collectives.all_reduce(summed)
        return BatchResult(loss=summed / self.tokens.clamp_min(1.0), tokens=self.tokens)


def check_stage_interface(stages: Stages) -> None:
    """Raise `ConfigurationError` unless the stages' forward takes the hidden states of the stage before."""
    for number, stage in zip(stages.numbers, stages):
        if number > 0 and not forward_takes(stage, "inputs_embeds"):
            raise ConfigurationError(
                f"{type(stage).__name__} cannot be a later pipeline stage: its forward has no argument inputs_embeds, "
                "which is the output of the stage before in place of embeddings. Add it, as for a vLLM pipeline."
            )
