"""The implementations of training that `benchmarks/training.py` compares, all started from one directory."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decoder import build_model
from timing import seconds
from torch import nn

import polyshard as ps

ATTENTION = {"cuda": ("flash_attention_2", "sdpa"), "cpu": ("sdpa", "eager")}  # the fastest one is used
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Contestant:
    """One implementation of training.

    Attributes:
        loss: maps `(input IDs [rows, length], labels)` to the mean loss; a label is the next token.
        model: whose parameters are updated.
        optimizer: torch's.
        detail: the attention implementation.
    """

    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    detail: str

    def step(self, batch: Batch) -> torch.Tensor:
        """Run forward, backward and update; return the loss."""
        loss = _forward_backward(self.loss, batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def held_bytes(self) -> int:
        """Return the bytes of weights and optimizer state."""
        states = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *states))


def _contestant(loss: Callable[..., torch.Tensor], model: nn.Module, detail: str) -> Contestant:
    return Contestant(loss, model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), detail)


def transformers_model(directory: Path, attention: str, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention)
    return model.to(device).train()


def save_random(shape: dict[str, Any], directory: Path, dtype: torch.dtype) -> None:
    """Return a Hugging Face directory with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(directory)


def of_transformers(
    directory: Path, dtype: torch.dtype, device: torch.device, compiled: bool, batch: Batch
) -> Contestant:
    """Return the fastest attention implementation of transformers on this machine, by timing each."""
    best, times = "", {}
    for attention in ATTENTION[device.type]:
        try:
            model = transformers_model(directory, attention, dtype, device)
            run = partial(_forward_backward, partial(_transformers_loss, model), batch)
            run()
            times[attention] = min(seconds(run, device) for _ in range(2))
        except (ImportError, ValueError, RuntimeError, torch.OutOfMemoryError):
            continue
        finally:
            model = None
            free(device)
    best = min(times, key=lambda name: times[name])
    model = transformers_model(directory, best, dtype, device)
    called: Any = torch.compile(model) if compiled else model
    return _contestant(partial(_transformers_loss, called), model, best)


def of_polyshard(directory: Path, dtype: torch.dtype, device: torch.device, compiled: bool) -> Contestant:
    from polyshard.attention.selection import select_kernel
    from polyshard.training.compile import apply_compile

    context = ps.initialize("torch", device=device)
    model = build_model(ps.read_config(directory), context)
    model.to(dtype)
    ps.load_checkpoint(model, directory, context, verify=False)
    apply_compile(model, compiled)
    first: Any = model.model.layers[0]
    kernel = select_kernel(first.self_attn.spec, device, dtype, True).name
    return _contestant(lambda ids, labels: model(ids, labels=labels), model, kernel)


def _transformers_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def of_megatron(directory: Path, dtype: torch.dtype, device: torch.device, length: int) -> Contestant:
    """Return Megatron-Core's own GPTModel, with the weights that `polyshard convert` wrote in Megatron's format."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    from polyshard.adapters.megatron import reference_logits
    from polyshard.adapters.megatron.compat import cuda_as_cpu
    from polyshard.config.decoder_spec import DecoderSpec
    from polyshard.convert.convert import convert

    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(prefix="polyshard-bench-") as work, cuda_as_cpu(device):
        target = Path(work) / "megatron"
        convert(directory, target, to_format="megatron-torch-dist")
        place = next(path for path in sorted(target.rglob("metadata.json"))).parent
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        parallel_state.initialize_model_parallel(1)
        spec = DecoderSpec.of(json.loads((directory / "config.json").read_text()))
        job = {**reference_logits._settings(spec, {}), "kind": "torch_dist", "place": str(place)}
        job["ids"] = torch.zeros(1, length, dtype=torch.int64)
        model = reference_logits._gpt(job)
        reference_logits._load(model, job, parallel_state)
    model.to(device, dtype).train()

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1], device=device)
        masked = positions[None] > positions[:, None]
        with cuda_as_cpu(device):
            return model(ids, positions[None].expand_as(ids), masked[None, None], labels=labels).float().mean()

    return _contestant(loss, model, "local spec")


def _forward_backward(loss: Callable[..., torch.Tensor], batch: Batch) -> torch.Tensor:
    value = loss(*batch)
    value.backward()
    return value.detach()


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
