"""`RolloutEngine`: a vLLM engine beside a trainer, which samples with the trainer's weights.

The engine runs in the trainer's processes (colocated) or in separate processes. If separate processes die, another
engine is started, receives the trainer's weights, and repeats the call.
"""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.engines.scratch import engine_folder, temporary_files_in
from polyshard.adapters.vllm.transfer.lora_sync import LoraSync, largest_rank
from polyshard.adapters.vllm.transfer.remote import BACKEND
from polyshard.adapters.vllm.transfer.sync import SyncReport, WeightSync
from polyshard.checkpoint.part import part_of
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError, WeightSyncError
from polyshard.core.ranks import Ranks
from polyshard.registry import engine_errors

logger = logging.getLogger(__name__)

_TORCHRUN = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC")
_DEATH_NOTICE = 5.0  # seconds until vLLM reports that an engine died
_MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled completion.

    Attributes:
        prompt: token IDs of the prompt.
        tokens: sampled token IDs, including the stop token.
        logprobs: log-probability of each sampled token, as the engine returned it.
        finished: whether the model ended the completion; False if it reached the length limit.
        version: version of the weights that sampled it.

    Examples:
        >>> rollout = Rollout(prompt=(1, 2), tokens=(7, 3), logprobs=(-0.5, -1.0), finished=True, version="4")
        >>> torch.tensor(rollout.logprobs).sum()  # log-probability of the completion
        tensor(-1.5000)
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    version: str


class RolloutEngine:
    """A vLLM engine that samples with a trainer's weights.

    Every rank of the trainer creates one, and calls the same methods in the same order.

    Args:
        directory: a Hugging Face directory of the model, without a LoRA adapter; its weights are used only until the
            first sync.
        architecture: name of a registered model.
        trainer: a training engine, or a model that its factory built.
        parallel_context: the context that the model was built with.
        colocated: run in the trainer's processes, tensor-parallel over all ranks. If False, the first rank starts
            separate processes.
        restarts: how often an engine in separate processes is restarted after it dies.
        sync_timeout: seconds after which an unresponsive engine is an error.
        options: arguments of `vllm.LLM`. By default the engine runs eagerly and without a tokenizer. Beside a trainer
            on a GPU set `gpu_memory_utilization`: vLLM's default requires 90% of the device memory to be free.

    Attributes:
        restarted: number of restarts so far.

    Raises:
        RegistrationError: the engine cannot serve the model. Other errors of a worker are raised with their cause.
        ConfigurationError: the engine cannot receive weights, or only one of trainer and engine is in exact mode.

    Examples:
        >>> with RolloutEngine("model", "MyModel", trainer, context) as engine:  # needs vLLM  # doctest: +SKIP
        ...     report = engine.sync()
        ...     (samples,) = engine.generate([[1, 2, 3]], samples=4, max_tokens=16)
    """

    def __init__(
        self,
        directory: str | Path,
        architecture: str,
        trainer: Any,
        parallel_context: ParallelContext,
        *,
        colocated: bool = True,
        restarts: int = 3,
        sync_timeout: float = 600.0,
        **options: Any,
    ) -> None:
        self._directory, self._architecture = str(directory), architecture
        self._trainer, self._context = trainer, parallel_context
        self._colocated, self._restarts_left, self._timeout = colocated, restarts, sync_timeout
        self._options: dict[str, Any] = {
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            **options,
        }
        self._ranks = Ranks.of(parallel_context)
        self._keep_process_group = dist.is_available() and dist.is_initialized()
        self._version = "0"
        self.restarted = 0
        self.llm: Any = None
        self._sync: WeightSync | None = None
        module = getattr(trainer, "module", trainer)
        self._lora_rank = 0 if part_of(module) is None else largest_rank(module)
        self._lora: LoraSync | None = None
        if self._lora_rank:
            rank = compat.max_lora_rank(self._lora_rank)
            if rank is None:
                raise ConfigurationError(f"vLLM serves no LoRA adapter of rank {self._lora_rank}.")
            self._options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank, **self._options}
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # for the engine's sockets
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
            ConfigurationError: a prompt is empty, or a sampling parameter is unknown or unsupported.
            Exception: the engine died more than `restarts` times; the error is vLLM's.
        """
        check_sampling(sampling)
        token_ids = [list(prompt) for prompt in prompts]
        if not all(token_ids):
            raise ConfigurationError(f"prompt {token_ids.index([])} of {len(token_ids)} is empty")
        return self._with_restarts(lambda: self._generate(token_ids, samples, sampling))

    def sync(self, version: str | None = None) -> SyncReport:
        """Send the trainer's current weights to the engine; see `WeightSync`. A collective.

        Of a trainer with a LoRA adapter, the frozen weights are sent to each engine once, then the adapter alone.

        Args:
            version: a name for the weights; by default a number that counts up.

        Raises:
            WeightSyncError: the engine is alive but does not hold the weights that were sent.
        """
        name = str(int(self._version) + 1) if version is None and self._version.isdigit() else version
        return self._with_restarts(lambda: self._synced(name))

    def close(self) -> None:
        """Shut down the engine, and release its resources."""
        for sync in (self._sync, self._lora):
            if sync is not None:
                sync.close()
        self._lora = None
        if self.llm is not None:
            compat.shut_down_engine(self.llm, self._keep_process_group)
        self.llm = self._sync = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> RolloutEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generate(self, prompts: list[list[int]], samples: int, sampling: dict[str, Any]) -> list[list[Rollout]]:
        if self.llm is None:  # it runs on another rank
            return []
        from vllm import SamplingParams

        parameters = SamplingParams(n=samples, logprobs=0, detokenize=False, **sampling)
        with compat.raises_if_engine_dies(self.llm):
            outputs = self.llm.generate(
                [{"prompt_token_ids": p} for p in prompts],
                parameters,
                lora_request=None if self._lora is None else self._lora.request,
                use_tqdm=False,
            )
        return [
            [_rollout(prompt, answer, self._version) for answer in output.outputs]
            for prompt, output in zip(prompts, outputs)
        ]

    def _synced(self, version: str | None) -> SyncReport:
        assert self._sync is not None
        if self._lora_rank and self._lora is None:
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
            self.close()
            self._start()
            self._synced(self._version)

    def _engine_died(self) -> bool:
        """Whether the engine died; waits, because vLLM reports a death with a delay."""
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
                    self.llm = self._colocated_engine()
                elif self._ranks.rank == 0:
                    self.llm = self._separate_engine()
        except Exception as problem:
            error = problem
        if not self._colocated:
            self._ranks.raise_on_all(error, "the rollout engine did not start", ConfigurationError)
        elif error is not None:
            raise error
        self._sync = WeightSync(self._trainer, self._context, self.llm, timeout=self._timeout)

    def _colocated_engine(self) -> Any:
        from vllm import LLM

        options: dict[str, Any] = dict(self._options)
        if self._ranks.size > 1:
            options["tensor_parallel_size"] = self._ranks.size
            options["distributed_executor_backend"] = "external_launcher"
        with _environment({_MULTIPROCESSING: "0"}):
            return LLM(self._directory, hf_overrides={"architectures": [self._architecture]}, **options)

    def _separate_engine(self) -> Any:
        from vllm import LLM

        hidden = {name: None for name in os.environ if name.startswith(_TORCHRUN)}
        chosen = os.environ.get(_MULTIPROCESSING, "1")  # on CPU vLLM distinguishes "1" from other true values
        with _environment({_MULTIPROCESSING: chosen if int(chosen) else "1", **hidden}):
            return LLM(
                self._directory,
                hf_overrides={"architectures": [self._architecture]},
                weight_transfer_config={"backend": BACKEND},
                **self._options,
            )


_UNSUPPORTED = {
    "n": "use samples=",
    "logprobs": "a Rollout holds the log-probability of each sampled token and of no other",
    "prompt_logprobs": "a Rollout holds log-probabilities of sampled tokens only; use ps.token_logprobs for prompts",
    "logprob_token_ids": "a Rollout holds the log-probability of each sampled token and of no other",
    "detokenize": "a Rollout holds token IDs",
    "output_kind": "a Rollout is a finished completion",
}


def check_sampling(sampling: dict[str, Any]) -> None:
    """Raise `ConfigurationError` for sampling parameters that vLLM lacks or whose results a `Rollout` does not hold."""
    from vllm import SamplingParams

    known = set(inspect.signature(SamplingParams).parameters) - set(_UNSUPPORTED)
    for name in sampling:
        if name in _UNSUPPORTED:
            raise ConfigurationError(
                f"RolloutEngine.generate does not take {name}={sampling[name]!r}: {_UNSUPPORTED[name]}"
            )
        if name not in known:
            raise ConfigurationError(
                f"unknown sampling parameter {name!r}: expected samples or one of {', '.join(sorted(known))}"
            )


def _rollout(prompt: list[int], answer: Any, version: str) -> Rollout:
    tokens = tuple(answer.token_ids)
    return Rollout(
        prompt=tuple(prompt),
        tokens=tokens,
        logprobs=tuple(step[token].logprob for step, token in zip(answer.logprobs, tokens)),
        finished=answer.finish_reason == "stop",
        version=version,
    )


@contextmanager
def _environment(changes: dict[str, str | None]) -> Iterator[None]:
    """Set environment variables that vLLM reads while an engine starts; restore them afterwards."""
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
