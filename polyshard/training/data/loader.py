"""A loader of the micro-batches of each step, which resumes at any data-parallel size."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from polyshard.attention.context_parallel.shards import context_shard
from polyshard.core.batch import MicroBatch
from polyshard.core.context import ParallelContext, check_context
from polyshard.core.errors import ConfigurationError
from polyshard.core.ranks import Ranks
from polyshard.training.data.order import Last, Position, RowOrder, is_count
from polyshard.training.data.packing import packed_batch

logger = logging.getLogger(__name__)


class StepLoader:
    """The micro-batches of each step, for `TrainingEngine.train_batch`, on torch's `DataLoader`.

    All ranks agree on the rows of a step; each data-parallel rank reads its share of them. The position is therefore
    one for the whole run: the epoch and the number of its rows that are consumed. A run that is resumed reads the same
    rows in the same steps, at another number of data-parallel ranks or of workers too.

    Iterating yields a list of micro-batches on the context's device for each step, and continues where the last
    iteration ended. Under context parallel, tensors in the shape of `input_ids` are sharded with `context_shard`.

    Args:
        rows: a dataset with `__len__` and `__getitem__`, the same on every rank, such as `PackedDocuments`.
        parallel_context: the parallel context. Constructing a loader is a collective.
        batch: rows of a step, over all ranks.
        micro_batch: rows of a micro-batch on one rank; default: all of its share.
        seed: seed of the order; each epoch has its own.
        shuffle: False reads the rows in order.
        last: what becomes of rows at the end of an epoch that do not fill a step. `"carry"` reads them in one step with
            the first rows of the next epoch, so that every row is read once in each epoch; `"drop"` leaves them out;
            `"error"` rejects the dataset.
        epochs: number of epochs after which iterating ends, without rows that do not fill a step; None for no end.
        workers: processes of each rank that read rows.
        collate: makes a micro-batch of a list of rows; default: `packed_batch`.

    Raises:
        ConfigurationError: an argument is invalid, the batch cannot be divided over ranks and micro-batches, the
            dataset is too small, or ranks have different datasets or settings.

    Examples:
        >>> context = ps.initialize("torch")
        >>> rows = ps.PackedDocuments([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 1]], length=3)
        >>> loader = StepLoader(rows, context, batch=2, micro_batch=1)
        >>> micro_batches = next(iter(loader))
        >>> len(micro_batches), micro_batches[0]["input_ids"].shape
        (2, torch.Size([3]))
        >>> loader.state_dict()["row"]
        2
    """

    def __init__(
        self,
        rows: Any,
        parallel_context: ParallelContext,
        *,
        batch: int,
        micro_batch: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        last: Last = "carry",
        epochs: int | None = None,
        workers: int = 0,
        collate: Callable[[Sequence[Any]], MicroBatch] = packed_batch,
    ) -> None:
        check_context(parallel_context, "StepLoader")
        axis = parallel_context.axis("data")

        def divided() -> tuple[RowOrder, int]:
            if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
                raise ConfigurationError(
                    f"rows is invalid: got {type(rows).__name__}, expected a dataset with __len__ and __getitem__. For "
                    "a stream use torchdata's StatefulDataLoader."
                )
            if not callable(collate):
                raise ConfigurationError(
                    f"collate is invalid: got {collate!r}, expected a function from a list of rows to a micro-batch."
                )
            for name, value, least in (("batch", batch, 1), ("workers", workers, 0)):
                if not is_count(value, least):
                    raise ConfigurationError(
                        f"{name} is invalid: got {value!r}, expected an integer of at least {least}."
                    )
            for name, value in (("micro_batch", micro_batch), ("epochs", epochs)):
                if value is not None and not is_count(value, 1):
                    raise ConfigurationError(
                        f"{name} is invalid: got {value!r}, expected None or an integer of at least 1."
                    )
            order = RowOrder(rows=len(rows), batch=batch, seed=seed, shuffle=shuffle, last=last)
            size = max(1, batch // axis.size) if micro_batch is None else micro_batch
            if batch % (axis.size * size):
                raise ConfigurationError(
                    f"the batch cannot be divided: got {batch} rows, expected a multiple of {axis.size} data-parallel "
                    f"ranks times {size} rows of a micro-batch."
                )
            return order, size

        ranks = Ranks.of(parallel_context)
        self._order, size = ranks.run_on_all(divided, "the loader cannot be built", ConfigurationError)
        self._identity = {"rows": len(rows), "fingerprint": getattr(rows, "fingerprint", None)}
        settings = (self._order, self._identity, size, epochs)
        if any(other != settings for other in ranks.gather(settings)):
            raise ConfigurationError(
                f"ranks have different data: got {settings} on this rank. Pass the same rows and settings on every one."
            )
        if last == "drop" and len(rows) % batch:
            logger.warning("%d of %d rows are dropped in each epoch (last='drop')", len(rows) % batch, len(rows))
        if last == "carry" and epochs is not None and len(rows) * epochs % batch:
            logger.warning("%d rows are dropped after the last epoch", len(rows) * epochs % batch)
        self._rows, self._context, self._collate = rows, parallel_context, collate
        self._share, self._micro_batch, self._epochs, self._workers = axis, size, epochs, workers
        self._position = Position()
        self._iterating = False

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        if self._iterating:
            raise ConfigurationError("the loader is being iterated: a second iteration would share its position.")
        self._iterating = True
        after: deque[Position] = deque()  # of the steps that workers have begun

        def shares() -> Iterator[list[int]]:
            for rows, position in self._order.steps(self._position, self._epochs):
                after.append(position)
                yield rows[self._share.rank :: self._share.size]

        batches = DataLoader(
            self._rows,
            batch_sampler=shares(),  # pyrefly: ignore  # any iterable of lists
            collate_fn=_Split(self._micro_batch, self._collate),
            num_workers=self._workers,
            timeout=self._context.group_timeout if self._workers else 0,
            pin_memory=self._context.device.type == "cuda",
            # Of its own: torch would draw the workers' seed from the default generator, which dropout uses.
            generator=torch.Generator().manual_seed(self._order.seed),
        )
        try:
            for micro_batches in batches:
                self._position = after.popleft()
                yield [self._placed(micro_batch) for micro_batch in micro_batches]
        finally:
            self._iterating = False

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last step that was yielded, as JSON; equal on every rank."""
        order = {"seed": self._order.seed, "shuffle": self._order.shuffle}
        return {**self._position._asdict(), **order, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position.

        Raises:
            ConfigurationError: it is a position in other data, or in another order, or the loader is being iterated.

        Examples:
            >>> rows = ps.PackedDocuments([[1, 2], [3, 4]], length=2)
            >>> loader = ps.StepLoader(rows, ps.initialize("torch"), batch=1)
            >>> loader.load_state_dict({**loader.state_dict(), "row": 1})
            >>> loader.load_state_dict({**loader.state_dict(), "rows": 9})
            Traceback (most recent call last):
            polyshard.core.errors.ConfigurationError: the position is of other data: ...
        """
        if self._iterating:
            raise ConfigurationError("the loader is being iterated. Load its position before.")
        if not isinstance(state, Mapping):
            raise ConfigurationError(
                f"the position is invalid: got {type(state).__name__}, expected what state_dict() returned."
            )
        mine = {name: value for name, value in self.state_dict().items() if name not in Position._fields}
        saved = {name: state.get(name) for name in mine}
        if saved != mine:
            raise ConfigurationError(f"the position is of other data: got {saved}, expected {mine}.")
        at: dict[str, Any] = {name: state.get(name) for name in Position._fields}
        if not all(is_count(value, 0) for value in at.values()) or at["row"] > self._order.rows:
            raise ConfigurationError(
                f"the position is invalid: got {at}, expected an epoch from 0 and a row from 0 to {self._order.rows}."
            )
        self._position = Position(**at)

    def _placed(self, micro_batch: MicroBatch) -> MicroBatch:
        """Return a micro-batch on the device, with this rank's part of the tokens."""
        shape = micro_batch["input_ids"].shape if "input_ids" in micro_batch else None
        placed: dict[str, Any] = {}
        for name, value in micro_batch.items():
            if isinstance(value, torch.Tensor):
                value = value.to(self._context.device, non_blocking=True)
                if value.shape == shape and name != "cu_seqlens":  # boundaries are those of all tokens
                    value = context_shard(value, self._context, dim=value.dim() - 1)
            placed[name] = value
        return placed


class _Split:
    """Makes micro-batches of a rank's rows of a step; a class, so that it can be sent to workers."""

    def __init__(self, size: int, collate: Callable[[Sequence[Any]], MicroBatch]) -> None:
        self.size, self.collate = size, collate

    def __call__(self, rows: Sequence[Any]) -> list[MicroBatch]:
        return [self._collated(rows[begin : begin + self.size]) for begin in range(0, len(rows), self.size)]

    def _collated(self, rows: Sequence[Any]) -> MicroBatch:
        micro_batch = self.collate(rows)
        if not isinstance(micro_batch, Mapping):
            raise ConfigurationError(
                f"collate returns no micro-batch: got {type(micro_batch).__name__}, expected a mapping of the "
                "arguments of the model's forward, and labels."
            )
        return micro_batch
