"""vLLM engines seen from outside: settings, worker, death and shutdown."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm import envs
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.distributed import parallel_state
from vllm.v1.engine.exceptions import EngineDeadError


def model_dtype(vllm_config: Any) -> torch.dtype:
    """Return the dtype of a model's weights, after vLLM has read its config."""
    return vllm_config.model_config.dtype


def engine_dtype(llm: Any) -> torch.dtype:
    """Return the dtype of an engine's weights."""
    return model_dtype(llm.llm_engine.vllm_config)


def is_eager(vllm_config: VllmConfig) -> bool:
    """Whether the model runs eagerly, without `torch.compile`."""
    return vllm_config.compilation_config.mode == CompilationMode.NONE


def captures_graphs(vllm_config: VllmConfig) -> bool:
    """Whether forward passes are captured as CUDA graphs; never on CPU, where vLLM ignores the configured mode."""
    on_cpu = vllm_config.device_config.device_type == "cpu"
    return not on_cpu and vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE


def runs_pipelines(vllm_config: VllmConfig) -> bool:
    """Whether vLLM creates the buffers between pipeline stages; on CPU it does so only while it compiles.

    Source: v1/worker/cpu_worker.py and gpu_model_runner.py, `intermediate_tensors`, 0.32.
    """
    on_cpu = vllm_config.device_config.device_type == "cpu"
    return not (on_cpu and is_eager(vllm_config))


def seeded_tokens_per_step(llm: Any) -> int | None:
    """Return the number of tokens above which an engine may die of requests with a seed; None if it never does.

    When a step computes a part of a prompt, vLLM takes back the random number of its discarded sample, which torch's
    generators do not support on CPU: the engine dies of "CPU Generator does not use offset" (0.32,
    v1/worker/gpu_model_runner.py, `set_offset`).
    """
    config = llm.llm_engine.vllm_config
    on_cpu, scheduler = config.device_config.device_type == "cpu", config.scheduler_config
    return scheduler.max_num_batched_tokens if on_cpu and scheduler.enable_chunked_prefill else None


def unfinished_requests(llm: Any) -> list[str]:
    """Return the IDs of an engine's unfinished requests."""
    return list(llm.llm_engine.output_processor.request_states)


def abort_requests_until(llm: Any, moment: float) -> int:
    """Abort the requests that an engine in this process had at a time (`time.time`); return their number.

    After a step that raised, vLLM (0.32) keeps its requests as running: `LLM.generate` has lost their outputs, and
    steps that engine for ever once such requests take up `max_num_seqs`.
    """
    known = llm.llm_engine.engine_core.engine_core.scheduler.requests
    found = [name for name, request in known.items() if request.arrival_time <= moment]
    if found:
        llm.llm_engine.abort_request(found, internal=True)
    return len(found)


@dataclass(frozen=True, slots=True)
class LocalWorker:
    """The worker of an engine that runs in this process."""

    model: nn.Module
    vllm_config: VllmConfig


def local_worker(llm: Any) -> LocalWorker | None:
    """Return the worker of an engine in this process (single process or torchrun's external launcher); else None."""
    executor = getattr(llm.llm_engine, "model_executor", None)
    worker = getattr(executor, "driver_worker", None)
    worker = getattr(worker, "worker", worker)
    runner = getattr(worker, "model_runner", None)
    if runner is None:
        return None
    return LocalWorker(runner.get_model(), llm.llm_engine.vllm_config)


def engine_is_dead(llm: Any) -> bool:
    """Whether the child processes of an engine have died.

    Source: v1/engine/core_client.py, BackgroundResources, 0.32.
    """
    resources = getattr(llm.llm_engine.engine_core, "resources", None)
    return bool(getattr(resources, "engine_dead", False))


@contextlib.contextmanager
def raises_if_engine_dies(llm: Any) -> Iterator[None]:
    """Raise `EngineDeadError` from a call that waits for an engine's outputs if the engine is killed.

    vLLM detects the death in a separate thread but leaves the call waiting forever (0.32, v1/engine/core_client.py,
    SyncMPClient.get_output).
    """
    outputs = getattr(llm.llm_engine.engine_core, "outputs_queue", None)
    if outputs is None:  # an engine in this process
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            if engine_is_dead(llm):
                outputs.put_nowait(EngineDeadError())
                return

    thread = threading.Thread(target=watch, name="polyshard-engine-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def shut_down_engine(llm: Any, keep_world: bool) -> None:
    """Shut down an engine: its child processes, or its worker in this process.

    vLLM's shutdown destroys torch's default process group even if vLLM did not create it (0.32,
    distributed/parallel_state.py, destroy_distributed_environment).

    Args:
        llm: the engine.
        keep_world: keep the default process group, and destroy only the groups of an engine in this process.
    """
    client = llm.llm_engine.engine_core
    core = getattr(client, "engine_core", None)
    if core is None or not keep_world:
        client.shutdown()
        return
    if client._finalizer.detach() is None:
        return
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
    envs.disable_envs_cache()
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None
