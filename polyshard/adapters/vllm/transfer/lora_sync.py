"""`LoraSync`: transfer of a trainer's LoRA adapter into running vLLM engines, through files in PEFT's format."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.transfer.local import abort_failed_requests
from polyshard.adapters.vllm.transfer.report import SyncReport
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError, WeightSyncError
from polyshard.core.ranks import Ranks
from polyshard.core.weight_table import stored_shape
from polyshard.lora.add import lora_layers
from polyshard.lora.files import lora_part_of, save_lora
from polyshard.weights.view import view_weights


class LoraSync:
    """A callable that sends a trainer's LoRA adapter to vLLM engines; every trainer rank creates one, and calls it.

    The engines must hold the trainer's frozen weights: start them from the base checkpoint, or call a `WeightSync` of
    the same model once, which sends the frozen weights only.

    Args:
        model: a model with an adapter (`polyshard.add_lora`), or the training engine around one.
        parallel_context: the context that the model was built with.
        engines: `vllm.LLM` objects, started with `enable_lora=True` and a sufficient `max_lora_rank`. Pass an engine in
            this process on every rank that runs one, and an engine in separate processes only on the first rank.
        name: name of the adapter in the engines.
        lora_id: its number in the engines, which no other adapter may have.
        directory: where the adapter's files are written, on a file system that trainer and engines share; by default a
            temporary directory of this machine. Only the newest version is kept.
        timeout: seconds after which an unresponsive engine is an error.

    Raises:
        ConfigurationError: the model has no adapter, or an engine was started without LoRA or with a smaller rank.

    Examples:
        >>> with ps.LoraSync(engine, context, llm) as sync:  # needs vLLM  # doctest: +SKIP
        ...     report = sync()
        ...     outputs = llm.generate(prompts, lora_request=sync.request)
    """

    def __init__(
        self,
        model: nn.Module | Any,
        parallel_context: ParallelContext,
        engines: Any | Sequence[Any] | None = None,
        *,
        name: str = "polyshard",
        lora_id: int = 1,
        directory: str | Path | None = None,
        timeout: float = 600.0,
    ) -> None:
        self._model, self._context = model, parallel_context
        self._ranks = Ranks.of(parallel_context)
        self._engines = [] if engines is None else list(engines) if isinstance(engines, (list, tuple)) else [engines]
        self._name, self._id, self._timeout = name, lora_id, timeout
        view = view_weights(model, parallel_context)
        self._table, self._dtypes = lora_part_of(view.module).table(view.table), view.dtypes
        rank = max(self._ranks.gather(largest_rank(view.module)))  # pipeline stages may have different ranks
        self._ranks.run_on_all(lambda: self._check_engines(rank), "the engines take no adapter", ConfigurationError)
        chosen = directory
        if directory is None:
            chosen = self._ranks.broadcast(tempfile.mkdtemp(prefix="polyshard-lora-") if self._ranks.rank == 0 else "")
        assert chosen is not None
        self._root = Path(chosen)
        self._remove = (
            weakref.finalize(self, shutil.rmtree, self._root, True)
            if directory is None and self._ranks.rank == 0
            else None
        )
        self._count = 0
        self._request: Any = None

    @property
    def request(self) -> Any:
        """The `LoRARequest` of the newest version, for `llm.generate(..., lora_request=sync.request)`.

        Raises:
            WeightSyncError: nothing has been sent.
        """
        if self._request is None:
            raise WeightSyncError("no LoRA adapter has been sent. Call the LoraSync first.")
        return self._request

    def __call__(self, version: str | None = None) -> SyncReport:
        """Send the trainer's current adapter to all engines, in place of the one before. A collective.

        Args:
            version: a name for the adapter, which the engines report as the version of their weights; by default a
                number that counts up.

        Raises:
            WeightSyncError: an engine has unfinished requests, did not answer, or rejected the adapter. All engines
                then serve the version before.
            CheckpointError: a rank could not write the files; the engines are unchanged.
            RankFailureError: a trainer rank died.
        """
        started = time.perf_counter()
        self._count += 1
        label = str(self._count) if version is None else version
        self._together(lambda: [self._require_idle(i) for i in range(len(self._engines))], "sync refused")
        folder = self._root / f"{self._count:08d}"
        save_lora(self._model, folder, self._context)
        request = compat.lora_request(self._name, self._id, folder)
        try:
            self._together(lambda: [self._replace(i, request, label) for i in range(len(self._engines))])
        except BaseException:
            for index in range(len(self._engines)):
                with contextlib.suppress(Exception):  # the first error is the one to raise
                    self._withdraw(index)
            if self._ranks.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        before, self._request = self._request, request
        if before is not None and self._ranks.rank == 0:
            shutil.rmtree(before.lora_path, ignore_errors=True)
        sizes = [
            math.prod(stored_shape(entry.layout, 1, 0)) * self._dtypes[name].itemsize
            for name, entry in self._table.items()
        ]
        return SyncReport(
            version=label, tensors=len(sizes), nbytes=sum(sizes), shared_bytes=0, seconds=time.perf_counter() - started
        )

    def close(self) -> None:
        """Remove the files, unless `directory` was given. The engines keep the adapter while they do not evict it."""
        if self._remove is not None:
            self._remove()

    def __enter__(self) -> LoraSync:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_engines(self, rank: int) -> None:
        for index, llm in enumerate(self._engines):
            config = compat.lora_config(llm)
            if config is None:
                raise ConfigurationError(f"engine {index} was started without LoRA. Start it with enable_lora=True.")
            if config.max_lora_rank < rank:
                raise ConfigurationError(
                    f"engine {index} has a smaller max_lora_rank than the adapter: got {config.max_lora_rank}, "
                    f"expected at least {rank}."
                )
            connector = compat.connector_without_reset(llm.llm_engine.vllm_config)
            if connector is not None:
                raise ConfigurationError(
                    f"engine {index} has the KV connector {connector}, which has no reset_cache, so that prompts would "
                    "continue from KV cache of the old adapter. Start it without this connector."
                )
            if compat.local_worker(llm) is None and self._ranks.rank:
                raise ConfigurationError(
                    f"engine {index} runs in separate processes, but was passed on rank {self._ranks.rank}. Pass it "
                    "only on the first trainer rank."
                )

    def _require_idle(self, index: int) -> None:
        abort_failed_requests(self._engines[index], f"engine {index}")
        requests = compat.unfinished_requests(self._engines[index])
        if requests:
            raise WeightSyncError(
                f"engine {index} has {len(requests)} unfinished requests: their KV cache was computed with the old "
                "adapter. Let them finish, or abort them, before a sync."
            )

    def _replace(self, index: int, request: Any, version: str) -> None:
        llm = self._engines[index]
        self._call(index, lambda: compat.replace_lora(llm, request))
        if not self._call(index, lambda: compat.reset_caches(llm)):
            raise WeightSyncError(f"engine {index} did not reset its prefix cache, because requests are unfinished.")
        self._call(index, lambda: llm.llm_engine.set_weight_version(version))

    def _withdraw(self, index: int) -> None:
        """Make an engine load the version before from its files at its next request."""
        llm = self._engines[index]
        self._call(index, lambda: llm.llm_engine.remove_lora(self._id))
        self._call(index, lambda: compat.reset_caches(llm))

    def _call(self, index: int, action: Callable[[], Any]) -> Any:
        """Call an engine; one in separate processes must answer within the timeout."""
        if compat.local_worker(self._engines[index]) is not None:
            return action()
        answers: list[Any] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                answers.append(action())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="polyshard-lora", daemon=True)
        thread.start()
        deadline = time.monotonic() + self._timeout
        while thread.is_alive() and time.monotonic() < deadline and not compat.engine_is_dead(self._engines[index]):
            thread.join(0.2)
        thread.join(0.2)
        if errors:
            raise errors[0]
        if not answers:
            dead = compat.engine_is_dead(self._engines[index])
            seen = "it is dead" if dead else f"no answer within {self._timeout:g} s"
            raise WeightSyncError(f"engine {index} did not take the LoRA adapter: {seen}.")
        return answers[0]

    def _together(self, action: Callable[[], Any], what: str = "LoRA sync failed") -> None:
        self._ranks.run_on_all(action, what, WeightSyncError)


def largest_rank(module: nn.Module) -> int:
    """Return the largest rank of a model's LoRA matrices."""
    return max(part.a.shape[0] for layer in lora_layers(module).values() for part in layer.parts)
