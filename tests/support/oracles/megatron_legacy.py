"""Legacy Megatron checkpoints laid out as Megatron's training saves them, from a Hugging Face state_dict."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import itertools
import pathlib
import random
import signal
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyshard.adapters.megatron.names import from_hugging_face
from polyshard.config.decoder_spec import DecoderSpec
from polyshard.convert.format import lazy


def training_state() -> dict[str, Any]:
    """What Megatron's training saves beside the weights: get_rng_state, the arguments, scheduler and rerun state."""
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.rerun_state_machine import RerunMode
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType

    arguments = argparse.Namespace(
        num_layers=2,
        params_dtype=torch.float32,
        attention_backend=AttnBackend.auto,
        mask=AttnMaskType.causal,
        exit_signal=signal.SIGTERM,
        data_path=[pathlib.PosixPath("/data/a")],
        nested=types.SimpleNamespace(depth=3),
        started=datetime.datetime(2026, 1, 2),
        seeds={1, 2},
        activation=torch.nn.functional.silu,
        scale=np.float32(0.5),
        optimizer_config=OptimizerConfig(lr=1e-3),
    )
    rng = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
    return {
        "args": arguments,
        "rng_state": [rng],
        "rerun_state_machine": {"mode": RerunMode.DISABLED, "sharded": {"current_iteration": np.int64(3)}},
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 7},
        "optimizer": {"optimizer": {"state": {}, "param_groups": [collections.OrderedDict(lr=1e-3)]}},
        "extra": io.BytesIO(b"fp8 scales"),
    }


_ROWS = ("word_embeddings.weight", "linear_qkv.weight", "linear_qkv.bias", "output_layer.weight")
_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def save_legacy(
    directory: Path,
    model: Any,
    *,
    tensor: int = 1,
    stages: tuple[int, ...] = (),
    padded: int | None = None,
    **content: Any,
) -> Path:
    """Write `mp_rank_TT[_PPP]/model_optim_rng.pt`.

    Args:
        directory: to write.
        model: of transformers.
        tensor: ranks.
        stages: layers of each pipeline stage; () for no pipeline.
        padded: rows of the vocabulary.
        content: of each file beside the weights.
    """
    spec = DecoderSpec.of(model.config.to_dict())
    tensors = {name: lazy(value.detach()) for name, value in model.state_dict().items()}
    if spec.tied:
        tensors.pop("lm_head.weight", None)
    stacked = from_hugging_face(tensors, spec, padded or spec.vocabulary)
    bounds = [sum(stages[:i]) for i in range(len(stages) + 1)] if stages else [0, spec.layers]
    for stage, (first, last) in enumerate(itertools.pairwise(bounds)):
        for rank in range(tensor):
            part: dict[str, torch.Tensor] = {}
            for name, value in stacked.items():
                if name.startswith("decoder.layers."):
                    for i in range(first, last):
                        local = name.replace("decoder.layers.", f"decoder.layers.{i - first}.")
                        part[local] = _cut(name, value[i], rank, tensor)
                elif (stage == 0 and name.startswith("embedding")) or (last == spec.layers and "embedding" not in name):
                    part[name] = _cut(name, value, rank, tensor)
            folder = directory / "iter_0000010" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages else ""))
            folder.mkdir(parents=True)
            torch.save(
                {"model": part, "checkpoint_version": 3.0, "iteration": 10, **content}, folder / "model_optim_rng.pt"
            )
    (directory / "latest_checkpointed_iteration.txt").write_text("10")
    return directory


def _cut(name: str, value: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    if name.endswith(_ROWS):
        return value.chunk(size)[rank].clone()
    if name.endswith(_COLUMNS):
        return value.chunk(size, dim=1)[rank].clone()
    if "linear_fc1.weight" in name or "linear_fc1.bias" in name:
        gate, up = value.chunk(2)
        return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank]))
    return value.clone()
