"""Sampling with a real vLLM engine in a separate process, with log-probabilities.

The workload is one whose bits are hard for a trainer to reproduce: prompts of many lengths, prefilled in chunks beside
decoding requests, then a single request, and prompts with a cached prefix.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polyshard.adapters.vllm.engines.score import engine_environment
from polyshard.adapters.vllm.engines.scratch import engine_folder
from polyshard.core.environment import TRACE
from polyshard.core.errors import PolyshardError
from polyshard.registry import engine_errors, register_model

NAME = "PolyshardSampled"
SPARE = 16  # positions of an engine's context that its longest prompt and completion leave free


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingJob:
    """A workload for one engine.

    Attributes:
        directory: a Hugging Face directory.
        factory: `module:attribute` of the model factory.
        dtype: dtype of the engine, as vLLM names it.
        prompts: token IDs of each prompt.
        tokens: number of tokens to sample per prompt.
        tensor: tensor-parallel size.
        adapter: adapter whose layers serve the model.
        exact: whether to serve in exact mode.
        shards: `exact_shards` of exact mode.
        chunk: maximum number of tokens in a step; longer prompts are prefilled in chunks.
        threads: number of threads per worker.
    """

    directory: str
    factory: str
    dtype: str
    prompts: list[list[int]]
    tokens: int
    tensor: int = 1
    adapter: str = "vllm"
    exact: bool = True
    shards: int | None = None
    chunk: int = 64
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One completion.

    Attributes:
        prompt: token IDs of the prompt.
        tokens: sampled token IDs.
        logprobs: log-probability of each sampled token, as the engine returned it.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def sample(job: SamplingJob, trace: Path | None = None) -> list[Sampled]:
    """Run a job on a new engine; with `trace`, the workers record every module's values in that directory.

    Raises:
        PolyshardError: the engine failed; the message holds the end of its output.
    """
    with engine_folder() as folder:
        environment = engine_environment(job.tensor, folder) | {"OMP_NUM_THREADS": str(job.threads)}
        if job.exact:  # expanded keys and values; the engine's attention over latents has no exact version
            environment["VLLM_MLA_DISABLE"] = "1"
        if trace is not None:
            environment[TRACE.name] = str(trace)
        request, response = Path(folder, "job.json"), Path(folder, "answers.json")
        request.write_text(json.dumps(asdict(job)))
        command = [sys.executable, "-m", __name__, str(request), str(response)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        if not response.exists():
            raise PolyshardError(f"vLLM at tensor-parallel {job.tensor} failed:\n{done.stderr[-2000:]}")
        return [Sampled(**answer) for answer in json.loads(response.read_text())]


def register_for(job: SamplingJob) -> dict[str, Any]:
    """Register the job's model in this process; return the options of its engine."""
    register_model(NAME, job.factory, adapter=job.adapter, exact=job.exact, exact_shards=job.shards)
    return {
        "hf_overrides": {"architectures": [NAME]},
        "tensor_parallel_size": job.tensor,
        "dtype": job.dtype,
        "max_model_len": max(map(len, job.prompts)) + job.tokens + SPARE,
        "max_num_batched_tokens": job.chunk,
        "max_num_seqs": min(16, job.chunk),
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": 256 << 20,
    }


def answers_of(llm: Any, job: SamplingJob) -> list[Sampled]:
    """Return the completions of an engine with the options of `register_for`."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=1.0, max_tokens=job.tokens, logprobs=0, ignore_eos=True, detokenize=False)
    answers = []
    for batch in (job.prompts, job.prompts[:1], job.prompts[-2:]):
        for output in llm.generate([{"prompt_token_ids": p} for p in batch], parameters, use_tqdm=False):
            ids = list(output.outputs[0].token_ids)
            steps: Any = output.outputs[0].logprobs
            logprobs = [step[i].logprob for step, i in zip(steps, ids)]
            answers.append(Sampled(prompt=list(output.prompt_token_ids or []), tokens=ids, logprobs=logprobs))
    return answers


def _main() -> None:
    job = SamplingJob(**json.loads(Path(sys.argv[1]).read_text()))
    options = register_for(job)
    from vllm import LLM

    with engine_errors():
        llm = LLM(job.directory, **options)
    answers = [asdict(answer) for answer in answers_of(llm, job)]
    # Written atomically, so that a failed run never leaves a partial file.
    temporary = Path(sys.argv[2]).with_suffix(".writing")
    temporary.write_text(json.dumps(answers))
    os.replace(temporary, sys.argv[2])


if __name__ == "__main__":
    _main()
