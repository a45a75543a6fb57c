"""`RolloutEngine`: vLLM engines that sample with a trainer's weights.

One engine runs in the trainer's processes (colocated) or in separate processes. If separate processes die, another
engine is started, receives the trainer's weights, and repeats the call. Or several engines that others have started
share the prompts.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from polyshard.adapters.vllm.clients.protocol import RolloutClient, listed_engines
from polyshard.adapters.vllm.engines.draws import same_draws
from polyshard.adapters.vllm.engines.pool import EnginePool
from polyshard.adapters.vllm.engines.rollout import Rollout, check_sampling, checked_prompts, refuse_chunked_seeds
from polyshard.adapters.vllm.engines.routing import ROUTING_WORKER, served_routing
from polyshard.adapters.vllm.engines.scratch import engine_folder, temporary_files_in
from polyshard.adapters.vllm.engines.start import DEFAULTS, start_colocated, start_separate
from polyshard.adapters.vllm.transfer.report import SyncReport
from polyshard.adapters.vllm.transfer.sync import WeightSync
from polyshard.checkpoint.part import part_of
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError, WeightSyncError
from polyshard.core.ranks import Ranks
from polyshard.registry import engine_errors

if TYPE_CHECKING:
    from polyshard.adapters.vllm.transfer.lora_sync import LoraSync

logger = logging.getLogger(__name__)

_DEATH_NOTICE = 5.0  # seconds until vLLM reports that an engine died


class RolloutEngine:
    """One or several vLLM engines that sample with a trainer's weights.

    Every rank of the trainer creates one, and calls the same methods in the same order.

    Args:
        directory: a Hugging Face directory of the model, without a LoRA adapter; its weights are used only until the
            first sync. None with `engines`.
        architecture: name of a registered model. None with `engines`.
        trainer: a training engine, or a model that its factory built.
        parallel_context: the context that the model was built with.
        colocated: run in the trainer's processes, tensor-parallel over all ranks. If False, the first rank starts
            separate processes.
        restarts: how often an engine in separate processes is restarted after it dies.
        sync_timeout: seconds after which an unresponsive engine is an error.
        engines: clients of engines that run elsewhere (`HttpClient`, `RayClient`, `LlmClient`), instead of an engine of
            its own. The first rank calls them. They share the prompts. If one dies, the others take over, and it is
            tried again at each sync. If none is left, calls wait `sync_timeout` seconds for one to come back. One that
            fails each sync for five times `sync_timeout`, and two minutes at least, is given up.
        return_routing: return the experts that tokens took with each `Rollout`, for `replay_routing`. Start `engines`
            with `worker_extension_cls=ps.ROUTING_WORKER`.
        interface: for `engines`, the network interface over which weights are sent; see `WeightSync`.
        options: arguments of `vllm.LLM`. By default the engine runs eagerly and without a tokenizer. Beside a trainer
            on a GPU set `gpu_memory_utilization`: vLLM's default requires 90% of the device memory to be free.

    Attributes:
        restarted: number of restarts so far; with `engines`, how often a lost engine came back.

    Raises:
        RegistrationError: the engine cannot serve the model. Other errors of a worker are raised with their cause.
        ConfigurationError: the engine cannot receive weights, only one of trainer and engine is in exact mode, or
            arguments exclude each other.

    Examples:
        >>> with RolloutEngine("model", "MyModel", trainer, context) as engine:  # needs vLLM  # doctest: +SKIP
        ...     report = engine.sync()
        ...     (samples,) = engine.generate([[1, 2, 3]], samples=4, max_tokens=16)
    """

    def __init__(
        self,
        directory: str | Path | None,
        architecture: str | None,
        trainer: Any,
        parallel_context: ParallelContext,
        *,
        colocated: bool = True,
        restarts: int = 3,
        sync_timeout: float = 600.0,
        engines: Sequence[RolloutClient] | None = None,
        interface: str | None = None,
        return_routing: bool = False,
        **options: Any,
    ) -> None:
        self._pool: EnginePool | None = None
        self._closed = False
        if engines is None and (directory is None or architecture is None):
            raise ConfigurationError("directory and architecture are missing. Pass both, or engines=.")
        self._directory, self._architecture = str(directory), architecture
        self._trainer, self._context = trainer, parallel_context
        self._colocated, self._restarts_left, self._timeout = colocated, restarts, sync_timeout
        self._returns_routing = return_routing
        self._options: dict[str, Any] = {**DEFAULTS, **options}
        if return_routing:
            self._options["worker_extension_cls"] = ROUTING_WORKER
        self._ranks = Ranks.of(parallel_context)
        self._keep_process_group = dist.is_available() and dist.is_initialized()
        self._version = "0"
        self.restarted = 0
        self.llm: Any = None
        self._sync: WeightSync | None = None
        module = getattr(trainer, "module", trainer)
        has_adapter = part_of(module) is not None
        self._lora: LoraSync | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # for the engine's sockets
        if engines is not None:
            self._check_pool(directory, architecture, options, has_adapter)
            clients = listed_engines(engines, only_clients=True)
            self._pool = EnginePool(clients, trainer, parallel_context, sync_timeout, interface, return_routing)
            return
        from polyshard.adapters.vllm import compat
        from polyshard.adapters.vllm.transfer.lora_sync import largest_rank

        # Pipeline stages may have different ranks, and all must start the engine with the largest.
        self._lora_rank = max(self._ranks.gather(largest_rank(module) if has_adapter else 0))
        if self._lora_rank:
            rank = compat.max_lora_rank(self._lora_rank)
            if rank is None:
                raise ConfigurationError(f"vLLM serves no LoRA adapter of rank {self._lora_rank}.")
            self._options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank, **self._options}
        self._start()

    def generate(self, prompts: Sequence[Sequence[int]], *, samples: int = 1, **sampling: Any) -> list[list[Rollout]]:
        """Sample completions of each prompt; every rank gets the same result.

        Args:
            prompts: token IDs, the same on every rank.
            samples: number of completions per prompt.
            sampling: arguments of `vllm.SamplingParams`: `max_tokens`, `temperature`, `stop_token_ids`, ...; except
                those that request results which a `Rollout` does not hold.

        Returns:
            For each prompt, `samples` rollouts.

        Raises:
            ConfigurationError: a prompt is empty or holds no token IDs, or a sampling parameter is unknown or
                unsupported.
            Exception: the engine died more than `restarts` times; the error is vLLM's.
        """
        self._require_open()
        check_sampling(sampling, known=self._pool is None)
        token_ids = checked_prompts(prompts, samples)
        if self._pool is not None:
            return self._pool.generate(token_ids, samples, sampling)
        return self._with_restarts(lambda: self._generate(token_ids, samples, sampling))

    def submit(self, prompts: Sequence[Sequence[int]], *, samples: int = 1, **sampling: Any) -> None:
        """Begin to sample completions of each prompt, and return at once; `collect` returns them.

        The engines sample while the trainer trains. A sync interrupts completions, which then go on with the new
        weights: `Rollout.versions` tells the weights of each token. Completions with penalties begin again.

        Args:
            prompts: token IDs, the same on every rank.
            samples: number of completions per prompt.
            sampling: see `generate`.

        Raises:
            ConfigurationError: the engine is not one of `engines`, or an argument is invalid.
        """
        self._require_open()
        check_sampling(sampling, known=False)
        token_ids = checked_prompts(prompts, samples)
        self._require_pool("submit").submit(token_ids, samples, sampling)

    def collect(self) -> list[list[Rollout]]:
        """Wait for the prompts that were submitted first; every rank gets the same result.

        Raises:
            ConfigurationError: nothing has been submitted.
            EngineFailureError: no engine is left, and none came back.
        """
        self._require_open()
        return self._require_pool("collect").collect()

    def join(self, engine: RolloutClient) -> None:
        """Add an engine, which takes part after the next sync. Every rank must call it."""
        (client,) = listed_engines(engine, only_clients=True)
        self._require_pool("join").join(client)

    def leave(self, name: str) -> None:
        """Remove an engine; others sample what it has not finished. Every rank must call it."""
        self._require_pool("leave").leave(name)

    def sync(self, version: str | None = None) -> SyncReport:
        """Send the trainer's current weights to the engine; see `WeightSync`. A collective.

        Of a trainer with a LoRA adapter, the frozen weights are sent to each engine once, then the adapter alone.

        Args:
            version: a name for the weights; by default a number that counts up.

        Raises:
            WeightSyncError: the engine is alive but does not hold the weights that were sent. With `engines`, all of
                them failed each sync until they were given up.
            EngineFailureError: none of `engines` can be reached.
        """
        self._require_open()
        name = str(int(self._version) + 1) if version is None and self._version.isdigit() else version
        if self._pool is not None:
            report = self._pool.sync(name or f"{self._version}+")
            self._version, self.restarted = report.version, self._pool.returned
            return report
        return self._with_restarts(lambda: self._synced(name))

    def close(self) -> None:
        """Shut down the engine, and release its resources. Engines that were given as `engines` go on."""
        self._closed = True
        self._shut_down()

    def _shut_down(self) -> None:
        if self._pool is not None:
            self._pool.close()
        for sync in (self._sync, self._lora):
            if sync is not None:
                sync.close()
        self._lora = None
        if self.llm is not None:
            from polyshard.adapters.vllm import compat

            compat.shut_down_engine(self.llm, self._keep_process_group)
        self.llm = self._sync = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> RolloutEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigurationError("the RolloutEngine is closed. Create another one.")

    def _require_pool(self, method: str) -> EnginePool:
        if self._pool is None:
            raise ConfigurationError(f"RolloutEngine.{method} requires engines that run elsewhere. Pass engines=.")
        return self._pool

    def _check_pool(self, directory: Any, architecture: Any, options: dict[str, Any], has_adapter: bool) -> None:
        named = {"directory": directory, "architecture": architecture}
        given = [*(name for name, value in named.items() if value is not None), *options]
        if given:
            raise ConfigurationError(f"engines= excludes {', '.join(given)}. Start the engines with these settings.")
        if has_adapter:
            raise ConfigurationError(
                "engines= does not support a trainer with a LoRA adapter, which is sent through files. Train all "
                "weights, or let RolloutEngine start the engine."
            )

    def _generate(self, prompts: list[list[int]], samples: int, sampling: dict[str, Any]) -> list[list[Rollout]]:
        if self.llm is None:  # it runs on another rank
            return []
        from vllm import SamplingParams

        from polyshard.adapters.vllm import compat
        from polyshard.adapters.vllm.transfer.local import abandoned_if_failed

        refuse_chunked_seeds(self.llm, sampling, prompts, samples)
        parameters = SamplingParams(n=samples, logprobs=0, detokenize=False, **sampling)
        draws = same_draws(self._ranks, self._context.device) if self._colocated else nullcontext()
        with compat.raises_if_engine_dies(self.llm), abandoned_if_failed(self.llm), draws:
            outputs = self.llm.generate(
                [{"prompt_token_ids": p} for p in prompts],
                parameters,
                lora_request=None if self._lora is None else self._lora.request,
                use_tqdm=False,
            )
            answers = [(prompt, answer) for prompt, output in zip(prompts, outputs) for answer in output.outputs]
            routing: Sequence[Mapping[str, torch.Tensor] | None] = [None] * len(answers)
            if self._returns_routing:
                routing = served_routing(self.llm, [[*prompt, *answer.token_ids] for prompt, answer in answers])
        rollouts = [
            _rollout(prompt, answer, self._version, experts)
            for (prompt, answer), experts in zip(answers, routing, strict=True)
        ]
        return [rollouts[start : start + samples] for start in range(0, len(rollouts), samples)]

    def _synced(self, version: str | None) -> SyncReport:
        assert self._sync is not None
        if self._lora_rank and self._lora is None:
            from polyshard.adapters.vllm.transfer.lora_sync import LoraSync

            self._sync(version)
            self._lora = LoraSync(self._trainer, self._context, self.llm, timeout=self._timeout)
        report = (self._lora or self._sync)(version)
        self._version = report.version
        return report

    def _with_restarts(self, action: Callable[[], Any]) -> Any:
        """Run an action; if the engine dies meanwhile, start another, send it the weights, and run the action again."""
        if self._colocated:
            return action()
        while True:
            error: Exception | None = None
            answer = None
            try:
                answer = action()
            except Exception as problem:
                error = problem
            died = self._ranks.broadcast(error is not None and self._engine_died())
            if not died:
                self._ranks.raise_on_all(error, "the rollout engine failed", WeightSyncError)
                return self._ranks.broadcast(answer)
            if self._restarts_left == 0:
                self._ranks.raise_on_all(error, "the rollout engine died", WeightSyncError)
            self._restarts_left -= 1
            self.restarted += 1
            if self._ranks.rank == 0:
                logger.warning(
                    "the rollout engine died (%s): starting another one, %d restarts left", error, self._restarts_left
                )
            self._shut_down()
            self._start()
            self._synced(self._version)

    def _engine_died(self) -> bool:
        """Whether the engine died; waits, because vLLM reports a death with a delay."""
        from polyshard.adapters.vllm import compat

        deadline = time.monotonic() + _DEATH_NOTICE
        while self.llm is not None:
            if compat.engine_is_dead(self.llm):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return False

    def _start(self) -> None:
        error: Exception | None = None
        self._folder = engine_folder()
        try:
            with engine_errors(), temporary_files_in(self._folder.name):
                if self._colocated:
                    self.llm = start_colocated(self._directory, self._architecture, self._ranks.size, self._options)
                elif self._ranks.rank == 0:
                    self.llm = start_separate(self._directory, self._architecture, self._options)
        except Exception as problem:
            error = problem
        if not self._colocated:
            self._ranks.raise_on_all(error, "the rollout engine did not start", ConfigurationError)
        elif error is not None:
            raise error
        self._sync = WeightSync(self._trainer, self._context, self.llm, timeout=self._timeout)


def _rollout(prompt: list[int], answer: Any, version: str, routing: Mapping[str, torch.Tensor] | None) -> Rollout:
    tokens = tuple(answer.token_ids)
    return Rollout(
        prompt=tuple(prompt),
        tokens=tokens,
        logprobs=tuple(step[token].logprob for step, token in zip(answer.logprobs, tokens)),
        finished=answer.finish_reason == "stop",
        version=version,
        versions=(version,) * len(tokens),
        routing=routing,
    )
