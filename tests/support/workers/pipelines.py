"""On each rank: a decoder that is cut into pipeline stages, and trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import decoder
import torch

import polyshard as ps
from polyshard.core.weight_table import stored_parts
from polyshard.weights.gather import gather_shards
from support.oracles.pipeline_training import STEPS, micro_batches

SGD = ps.TorchOptimizer(torch.optim.SGD, lr=1.0, weight_decay=0.0)


@dataclass(frozen=True)
class Case:
    """One run; `kind` is that of its micro-batches, `layers` the library of the model's layers."""

    name: str
    directory: str
    plan: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=lambda: {"pipeline": 2})
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "rows"
    layers: str = "torch"
    adapter: str = "torch"
    built: bool = True  # by build_stages, and not by the factory alone

    @property
    def optimizer(self):
        """SGD at learning rate 1, or what equals it."""
        return SGD


def start(case, optimizer=SGD, timeout=90):
    """A context, and an engine around the stages of a decoder with the weights of the directory."""

    def build(config, context, plan):
        if case.built:
            return ps.build_stages(decoder.build_model, config, context, plan)
        return decoder.build_model(config, context)

    return start_built(case, build, optimizer, timeout)


def start_built(case, build, optimizer, timeout):
    """The same for a model that `build(config, context, plan)` returns."""
    context = ps.initialize(case.adapter, timeout=timeout, **case.sizes)
    if case.layers != case.adapter:
        context = ps.load_adapter(case.layers).adopt(context)
    config = ps.read_config(case.directory)
    model = build(config, context, ps.pipeline_plan(config.num_hidden_layers, context.layout.pipeline, **case.plan))
    ps.load_checkpoint(model, case.directory, context)
    options = {"max_grad_norm": None, **case.options}
    return context, ps.load_adapter(case.adapter).engine(model, optimizer, context, **options)


def mine(context, batches):
    """This rank's micro-batches: those of its data-parallel position, and its part of their tokens."""
    data = context.axis("data")
    return [
        {name: ps.context_shard(value, context, dim=1).contiguous() for name, value in micro_batch.items()}
        if micro_batch["input_ids"].dim() == 2
        else micro_batch
        for micro_batch in batches[data.rank :: data.size]
    ]


def full_weights(engine, context):
    """The weights of this rank's stages by checkpoint names, gathered over the tensor and the expert axis."""
    found = {}
    for name, shard in engine.weights():
        entry = engine.table[name]
        full = gather_shards(shard, entry.layout, context.axis("tensor"), context.axis("expert"))
        found.update(zip(entry.checkpoint_names, stored_parts(entry.layout, len(entry.checkpoint_names), full.clone())))
    return found


def run_steps(context, engine, kind):
    """Losses, evaluation losses and norms of all steps."""
    losses, evaluated, norms = [], [], []
    for step in range(STEPS):
        batches = mine(context, micro_batches(kind, step))
        evaluated.append(engine.eval_batch(batches).loss.item())
        losses.append(engine.train_batch(batches).loss.item())
        norms.append(engine.step().grad_norm)
    return losses, evaluated, norms


def norms_and_all_reduces(engine):
    """The norms of a step with one train_batch and of one with two, and the number of their all-reduces over ranks."""
    norms, numbers = [], []
    for repeats in (1, 2):
        with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as reduced:
            for _ in range(repeats):
                engine.train_batch(micro_batches("rows", 0))
            norms.append(engine.step().grad_norm)
        groups = [call.kwargs.get("group") for call in reduced.call_args_list]
        numbers.append(sum(torch.distributed.get_world_size(group) > 1 for group in groups))
    return norms, numbers


def train(cases):
    """Losses, evaluation losses, norms and weights of each case."""
    results = {}
    for case in cases:
        context, engine = start(case, case.optimizer)
        results[case.name] = *run_steps(context, engine, case.kind), full_weights(engine, context)
        engine.close()
        ps.shutdown(context)
    return results
