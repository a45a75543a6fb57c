"""Starting a vLLM engine in the processes of a trainer, or in child processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from polyshard.adapters.vllm.clients.protocol import BACKEND

# Eagerly and without a tokenizer.
DEFAULTS: Mapping[str, Any] = {"enforce_eager": True, "skip_tokenizer_init": True, "disable_log_stats": True}

_TORCHRUN = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC")
_MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"


def start_colocated(directory: str, architecture: str | None, ranks: int, options: Mapping[str, Any]) -> Any:
    """Start an engine in the processes of a job, tensor-parallel over all its ranks.

    Args:
        directory: a Hugging Face directory of the model.
        architecture: name of a registered model; None for the checkpoint's.
        ranks: the number of ranks.
        options: arguments of `vllm.LLM`.
    """
    distributed: dict[str, Any] = {"tensor_parallel_size": ranks, "distributed_executor_backend": "external_launcher"}
    return _start({_MULTIPROCESSING: "0"}, directory, architecture, {**options, **(distributed if ranks > 1 else {})})


def start_separate(directory: str, architecture: str | None, options: Mapping[str, Any]) -> Any:
    """Start an engine in child processes, which do not see torchrun's environment; it can receive weights."""
    hidden = {name: None for name in os.environ if name.startswith(_TORCHRUN)}
    chosen = os.environ.get(_MULTIPROCESSING, "1")  # on CPU vLLM distinguishes "1" from other true values
    changes = {_MULTIPROCESSING: chosen if int(chosen) else "1", **hidden}
    return _start(changes, directory, architecture, {"weight_transfer_config": {"backend": BACKEND}, **options})


def _start(
    changes: Mapping[str, str | None], directory: str, architecture: str | None, options: Mapping[str, Any]
) -> Any:
    from vllm import LLM

    overrides: dict[str, Any] = {} if architecture is None else {"hf_overrides": {"architectures": [architecture]}}
    with _environment(changes):
        return LLM(directory, **overrides, **options)


@contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables that vLLM reads while an engine starts; restore them afterwards."""
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
