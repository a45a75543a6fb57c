"""Engines from outside: their settings, their worker, their end."""

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
    """Of a model's weights, once vLLM has read its config."""
    return vllm_config.model_config.dtype


def engine_dtype(llm: Any) -> torch.dtype:
    """Of an engine's weights."""
    return model_dtype(llm.llm_engine.vllm_config)


def is_eager(vllm_config: VllmConfig) -> bool:
    """Whether the model's operators run one by one, as they are written."""
    return vllm_config.compilation_config.mode == CompilationMode.NONE


def captures_graphs(vllm_config: VllmConfig) -> bool:
    """Whether forwards are captured as CUDA graphs; on CPU vLLM leaves the mode as it is, and captures nothing."""
    on_cpu = vllm_config.device_config.device_type == "cpu"
    return not on_cpu and vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE


def runs_pipelines(vllm_config: VllmConfig) -> bool:
    """Whether vLLM makes the buffers between pipeline stages: on CPU it does so only in the run that compiles.

    Source: v1/worker/cpu_worker.py and gpu_model_runner.py, `intermediate_tensors`, 0.32.
    """
    on_cpu = vllm_config.device_config.device_type == "cpu"
    return not (on_cpu and is_eager(vllm_config))


def unfinished_requests(llm: Any) -> list[str]:
    """Ids of the requests that an engine has not finished."""
    return list(llm.llm_engine.output_processor.request_states)


@dataclass(frozen=True, slots=True)
class LocalWorker:
    """The worker of an engine that runs in this very process."""

    model: nn.Module
    vllm_config: VllmConfig


def local_worker(llm: Any) -> LocalWorker | None:
    """An engine's worker, where it is in this process (one process, or torchrun's external launcher); else None."""
    executor = getattr(llm.llm_engine, "model_executor", None)
    worker = getattr(executor, "driver_worker", None)
    worker = getattr(worker, "worker", worker)
    runner = getattr(worker, "model_runner", None)
    if runner is None:
        return None
    return LocalWorker(runner.get_model(), llm.llm_engine.vllm_config)


def engine_is_dead(llm: Any) -> bool:
    """Whether the processes of an engine that has its own are gone.

    Source: v1/engine/core_client.py, BackgroundResources, 0.32.
    """
    resources = getattr(llm.llm_engine.engine_core, "resources", None)
    return bool(getattr(resources, "engine_dead", False))


@contextlib.contextmanager
def ends_with_engine(llm: Any) -> Iterator[None]:
    """Around a call that waits for an engine's outputs: an engine that was killed ends it with `EngineDeadError`.

    vLLM notices the death in a thread of its own, but leaves the call waiting for ever (0.32, v1/engine/core_client.py,
    SyncMPClient.get_output).
    """
    waiting = getattr(llm.llm_engine.engine_core, "outputs_queue", None)
    if waiting is None:  # an engine in this process
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            if engine_is_dead(llm):
                waiting.put_nowait(EngineDeadError())
                return

    thread = threading.Thread(target=watch, name="polyshard-engine-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def end_engine(llm: Any, keep_world: bool) -> None:
    """End an engine: its processes, or in this process its worker.

    vLLM's own shutdown ends with torch's default process group, whoever made it (0.32, distributed/parallel_state.py,
    destroy_distributed_environment). `keep_world`: an engine in this process leaves it; its own groups go.
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
