"""LoRA adapters of a running vLLM engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from vllm.config.lora import LoRAConfig, MaxLoRARanks
from vllm.lora.request import LoRARequest


def lora_request(name: str, number: int, path: Path) -> LoRARequest:
    """Return the object by which a request chooses an adapter."""
    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(path))


def lora_config(llm: Any) -> LoRAConfig | None:
    """Return an engine's LoRA settings; None if it was started without `enable_lora=True`."""
    return llm.llm_engine.vllm_config.lora_config


def max_lora_rank(rank: int) -> int | None:
    """Return the smallest `max_lora_rank` that vLLM accepts for adapters of this rank; None if it is too large."""
    return min((allowed for allowed in get_args(MaxLoRARanks) if allowed >= rank), default=None)


def replace_lora(llm: Any, request: LoRARequest) -> None:
    """Load an adapter from its directory, also if the engine holds an earlier one with its number.

    Without `load_inplace` vLLM keeps the earlier one, without an error (0.32, lora/worker_manager.py).
    """
    again = LoRARequest(request.lora_name, request.lora_int_id, request.lora_path, load_inplace=True)
    if not llm.llm_engine.add_lora(again):
        raise RuntimeError(f"vLLM did not load the LoRA adapter in {request.lora_path}")
