"""`RolloutEngine`: a vLLM engine beside a trainer, which samples from the trainer's weights.

It stands in the trainer's own processes (colocated), or in processes of its own, which may die: then another is
started, given the trainer's weights, and asked again.
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
from polyshard.adapters.vllm.transfer.remote import BACKEND
from polyshard.adapters.vllm.transfer.sync import SyncReport, WeightSync
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError, WeightSyncError
from polyshard.core.ranks import Ranks
from polyshard.registry import engine_errors

logger = logging.getLogger(__name__)

_TORCHRUN = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC")
_NOTICE = 5.0  # seconds
_MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled answer.

    Attributes:
        prompt: token ids.
        tokens: that were sampled, the one that ended the answer included.
        logprobs: of each, as the engine told them when it sampled.
        finished: whether the model ended the answer, rather than its length.
        version: of the weights that sampled it.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    version: str


class RolloutEngine:
    """Samples with a trainer's weights. Every rank of the trainer makes one, and calls its methods alike.

    Args:
        directory: a Hugging Face directory of the model: its weights matter until the first sync alone.
        architecture: a registered model's name.
        trainer: a training engine, or a model as its factory built it.
        parallel_context: with which it was built.
        colocated: in the trainer's own processes, tensor-parallel over all ranks; else in processes of its own, started
            by the first rank.
        restarts: how many deaths of an engine in processes of its own are mended.
        sync_timeout: seconds after which an engine that does not answer is an error.
        options: of `vllm.LLM`. Without others it runs eagerly, and without a tokenizer. Beside a trainer on a GPU give
            `gpu_memory_utilization`: vLLM's default wants nine tenths of the device to be free.

    Attributes:
        restarted: how often another engine had to be started.

    Raises:
        RegistrationError: the engine cannot serve the model; or another error of a worker, with its cause.
        ConfigurationError: it cannot take weights, or one of the two sides alone is in exact mode.
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
        self._colocated, self._left, self._timeout = colocated, restarts, sync_timeout
        self._options: dict[str, Any] = {
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            **options,
        }
        self._ranks = Ranks.of(parallel_context)
        self._world_was_there = dist.is_available() and dist.is_initialized()
        self._version = "0"
        self.restarted = 0
        self.llm: Any = None
        self._sync: WeightSync | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # of the engine's sockets
        self._start()

    def generate(self, prompts: Sequence[Sequence[int]], *, samples: int = 1, **sampling: Any) -> list[list[Rollout]]:
        """Sample answers to each prompt; the same on every rank.

        Args:
            prompts: token ids, the same on every rank.
            samples: of each prompt.
            sampling: of `vllm.SamplingParams`: `max_tokens`, `temperature`, `stop_token_ids`, ...; not those whose
                answer a `Rollout` does not hold.

        Raises:
            ConfigurationError: a prompt is empty; a sampling parameter is unknown or unsupported here.
            Exception: the engine died more often than `restarts`; the error is vLLM's.
        """
        check_sampling(sampling)
        asked = [list(prompt) for prompt in prompts]
        if not all(asked):
            raise ConfigurationError(f"prompt {asked.index([])} of {len(asked)} is empty")
        return self._mended(lambda: self._generate(asked, samples, sampling))

    def sync(self, version: str | None = None) -> SyncReport:
        """Bring the engine to the trainer's weights of this moment; see `WeightSync`. A collective.

        Raises:
            WeightSyncError: the engine lives, and does not hold what was sent.
        """
        name = str(int(self._version) + 1) if version is None and self._version.isdigit() else version
        return self._mended(lambda: self._synced(name))

    def close(self) -> None:
        """End the engine, and release what it held."""
        if self._sync is not None:
            self._sync.close()
        if self.llm is not None:
            compat.end_engine(self.llm, self._world_was_there)
        self.llm = self._sync = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> RolloutEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generate(self, prompts: list[list[int]], samples: int, sampling: dict[str, Any]) -> list[list[Rollout]]:
        if self.llm is None:  # another rank has it
            return []
        from vllm import SamplingParams

        parameters = SamplingParams(n=samples, logprobs=0, detokenize=False, **sampling)
        with compat.ends_with_engine(self.llm):
            outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
        return [
            [_rollout(prompt, answer, self._version) for answer in output.outputs]
            for prompt, output in zip(prompts, outputs)
        ]

    def _synced(self, version: str | None) -> SyncReport:
        assert self._sync is not None
        report = self._sync(version)
        self._version = report.version
        return report

    def _mended(self, action: Callable[[], Any]) -> Any:
        """Do it; where the engine died over it start another, give it the weights, and do it again."""
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
            if self._left == 0:
                self._ranks.raise_on_all(error, "the rollout engine died", WeightSyncError)
            self._left -= 1
            self.restarted += 1
            if self._ranks.rank == 0:
                logger.warning("the rollout engine died (%s): starting another, %d restarts left", error, self._left)
            self.close()
            self._start()
            self._synced(self._version)

    def _engine_died(self) -> bool:
        """Whether an error was the engine's death; vLLM's own notice of it may still be on its way."""
        deadline = time.monotonic() + _NOTICE
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
                    self.llm = self._engine_of_its_own()
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

    def _engine_of_its_own(self) -> Any:
        from vllm import LLM

        hidden = {name: None for name in os.environ if name.startswith(_TORCHRUN)}
        with _environment({_MULTIPROCESSING: "1", **hidden}):
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
    "output_kind": "a Rollout is a finished answer",
}


def check_sampling(sampling: dict[str, Any]) -> None:
    """Raise `ConfigurationError` for a sampling parameter that vLLM lacks or whose answer a `Rollout` does not hold."""
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
    """Environment variables that vLLM reads while an engine starts; put back afterwards."""
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
