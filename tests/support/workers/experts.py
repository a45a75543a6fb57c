"""What tests of experts run on each rank. Top-level functions: other processes import them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import decoder
import moe
import pytest
import torch

import polyshard as ps

PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40))]
TOKENS = 8
RATE = 100.0  # large, so that rounding of the weights does not hide an update


def build(directory: Path, context: ps.ParallelContext, balance: ps.Balance | None = None) -> moe.Decoder:
    model = moe.build_model(ps.read_config(directory), context, balance)
    ps.load_checkpoint(model, directory, context)
    return model


def tied(config: Any, context: ps.ParallelContext) -> decoder.Decoder:
    """A Qwen3-MoE with tied embeddings, in stages: a dense decoder whose MLPs are exchanged."""
    model = decoder.build_model(SimpleNamespace(**{**vars(config), "model_type": "qwen3"}), context)
    sizes = config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok
    for layer in model.model.layers:
        layer.mlp = ps.mixture_of_experts(*sizes, context, router=ps.Router(normalize=True))
        layer.feed = lambda x, layer=layer: x + layer.mlp(layer.post_attention_layernorm(x))
    return model


def rows_of(context: ps.ParallelContext, ids: torch.Tensor, labels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of one row: those of this rank, and of them this rank's part of each sequence."""
    axis = context.axis("data")
    return [
        {
            name: ps.context_shard(x[row : row + 1], context, dim=1)
            for name, x in (("input_ids", ids), ("labels", labels))
        }
        for row in range(axis.rank, len(ids), axis.size)
    ]


class Mixed:
    """A `LinearAdapter` with the experts of another library."""

    def __init__(self, layers: Any, experts: Any) -> None:
        self._layers, self.create_experts = layers, experts.create_experts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layers, name)


def initialize(libraries: str, **sizes: Any) -> tuple[str, ps.ParallelContext]:
    """The library, and a context of it; of `a+b`, with the experts of b."""
    library, _, experts = libraries.partition("+")
    context = ps.initialize(library, timeout=60, **sizes)
    if experts:
        context = dataclasses.replace(context, linear=Mixed(context.linear, ps.load_adapter(experts).linear))
    return library, context


def one_step(directory: Path, results: Path, batch: tuple, layouts: dict) -> dict:
    """Loss and gradient norm of a step of SGD in each layout, whose weights are saved under its name."""
    found = {}
    for name, (libraries, sizes, options) in layouts.items():
        adapter, context = initialize(libraries, **sizes)
        sgd = ps.TorchOptimizer(torch.optim.SGD, lr=RATE)
        engine = ps.load_adapter(adapter).engine(build(directory, context), sgd, context, max_grad_norm=0.5, **options)
        result = engine.train_batch(rows_of(context, *batch))
        norm = engine.step().grad_norm
        ps.save_checkpoint(engine, results / name, context, config=ps.read_config(directory))
        found[name] = (float(result.loss), norm)
        engine.close()
        ps.shutdown(context)
    return found


def resumed(directory: Path, results: Path, batch: tuple, saves: dict, resumes: dict) -> None:
    """Three steps of AdamW in each layout of `saves`, with the state saved after the second; the third step again in
    each layout of `resumes`, from the state that it names.

    The weights after the third step are saved under the name of the run.
    """
    runs = [(name, "", layout) for name, layout in saves.items()]
    for name, start, (libraries, sizes, options) in [*runs, *((n, *found) for n, found in resumes.items())]:
        adapter, context = initialize(libraries, **sizes)
        model = build(directory, context, ps.Balance(sequence=0.01, z=0.001, bias_rate=0.01))
        engine = ps.load_adapter(adapter).engine(model, ps.AdamW(lr=1e-2), context, **options)
        if start:
            ps.load_training_state(engine, results / f"state-{start}", context)
        for step in range(2 if start else 0, 3):
            engine.train_batch(rows_of(context, *batch))
            engine.step()
            ps.update_router_bias(engine.module, context)
            if step == 1:
                state = results / f"state-{name}"
                ps.save_training_state(engine, state, context, step=2, config=ps.read_config(directory))
        ps.save_checkpoint(engine, results / name, context, config=ps.read_config(directory))
        engine.close()
        ps.shutdown(context)


def frozen(directory: Path, batch: tuple, layouts: dict) -> dict[str, bool]:
    """Of each library: whether frozen parameters keep their weights while the others are trained, and the gradient
    norm of the others; of frozen experts that are distributed over ranks, and of frozen layers around them.
    """
    found = {}
    for library, options in layouts.items():
        for frozen_experts in (True, False):
            context = ps.initialize(library, timeout=60, expert=2)
            model = build(directory, context)
            before = {}
            for name, parameter in model.named_parameters():
                parameter.requires_grad_((".experts." in name) != frozen_experts)
                before[parameter] = parameter.clone()
            engine = ps.load_adapter(library).engine(model, ps.AdamW(lr=1e-2), context, **options)
            rows = rows_of(context, *batch)
            with engine.accumulate():
                engine.backward(engine(rows[0]["input_ids"]).sum() * 0.0)
            engine.train_batch(rows)
            norm = engine.step().grad_norm
            kept = all(torch.equal(p, old) != p.requires_grad for p, old in before.items())
            found[library, frozen_experts] = kept, norm
            engine.close()
            ps.shutdown(context)
    return found


def refusals(directory: Path, refused: dict) -> dict[str, str]:
    """The error of each engine that cannot train experts that are distributed over ranks."""
    found = {}
    for name, (library, sizes, dtype, options) in refused.items():
        context = ps.initialize(library, timeout=60, **sizes)
        model = moe.build_model(ps.read_config(directory), context).to(dtype)
        with pytest.raises(ps.ConfigurationError) as error:
            ps.load_adapter(library).engine(model, ps.AdamW(), context, **options)
        found[name] = str(error.value)
        ps.shutdown(context)
    return found


def trained(
    directory: Path, results: Path, batch: tuple, layouts: dict, saves: dict, resumes: dict, refused: dict
) -> dict:
    (results / "resumed").mkdir(exist_ok=True)
    resumed(directory / "deepseek_v3", results / "resumed", batch, saves, resumes)
    steps = {kind: one_step(directory / kind, results / kind, batch, found) for kind, found in layouts.items()}
    kept = frozen(directory / "qwen3_moe", batch, {library: options for library, _, options in saves.values()})
    return {**steps, "frozen": kept, "refused": refusals(directory / "qwen3_moe", refused)}


def synced(directory: Path, results: Path, trainers: dict) -> dict:
    """Greedy generation of one engine over all ranks before and after the sync from each trainer, whose weights are
    saved under its name."""
    from support.engines import engine, greedy

    ps.initialize("torch", timeout=120)
    ps.register_model("Experts", moe.build_model, adapter="vllm")
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}
    with engine(directory, "Experts", **options) as llm:
        found = {"before": greedy(llm, PROMPTS, TOKENS)}
        for name, (sizes, options) in trainers.items():
            context = ps.initialize("torch", timeout=120, **sizes)
            sgd = ps.TorchOptimizer(torch.optim.SGD, lr=RATE)
            trainer = ps.load_adapter("torch").engine(build(directory, context), sgd, context, **options)
            ids = torch.arange(32).reshape(2, 16)
            trainer.train_batch(rows_of(context, ids, ids + 1))
            trainer.step()
            ps.WeightSync(trainer, context, llm, bucket_bytes=30_000)()
            found[name] = greedy(llm, PROMPTS, TOKENS)
            ps.save_checkpoint(trainer, results / name, context, config=ps.read_config(directory))
            trainer.close()
            for undo in context.on_shutdown:
                undo()
    return found


def sent(directory: Path) -> dict[str, torch.Tensor]:
    """The full tensors that a trainer with distributed experts sends to vLLM's own weight transfer."""
    from polyshard.adapters.vllm.transfer.source import LayoutSource

    context = ps.initialize("torch", timeout=60, expert=2)
    tensors = {name: tensor.clone() for name, tensor in LayoutSource(build(directory, context), context)}
    ps.shutdown(context)
    return tensors
