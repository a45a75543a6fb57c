"""vLLM engines for tests: in this process, small, eager."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

# Before vLLM is imported. Without torch.compile the first log-probability costs no 15 s.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@contextlib.contextmanager
def _few_collections() -> Iterator[None]:
    """Speed up the end of an engine, at whose steps vLLM collects garbage: half a second each for all imported objects.

    Objects that exist before the engine are frozen, and garbage is collected once.
    """
    gc.freeze()
    with mock.patch.object(gc, "unfreeze"), mock.patch.object(gc, "collect"):
        yield
    gc.collect()


@contextlib.contextmanager
def engine(directory: Path, architecture: str | None = None, **options: Any) -> Iterator[Any]:
    """An engine in this process; `architecture` overrides the checkpoint's."""
    import torch
    import torch.distributed as dist
    from vllm import LLM
    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    if architecture:
        options.setdefault("hf_overrides", {})["architectures"] = [architecture]
    if torch.cuda.is_available():  # else each would want nine tenths of the GPU to be free
        options.setdefault("gpu_memory_utilization", 0.1)
    settings = {
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        **options,
    }
    with _few_collections():
        try:
            llm = LLM(model=str(directory), **settings)
            yield llm
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.barrier()  # a rank that leaves while another still talks to it makes that one abort
            llm.llm_engine.engine_core.shutdown()
            del llm
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def greedy(llm: Any, prompts: list[list[int]], tokens: int) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their log-probabilities for each prompt."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=0, ignore_eos=True)
    return generated(llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False))


def generated(outputs: list[Any]) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities of each completion of each request."""
    found = []
    for output in outputs:
        for completion in output.outputs:
            ids = list(completion.token_ids)
            found.append((ids, [step[i].logprob for step, i in zip(completion.logprobs, ids)]))
    return found
