"""On each rank: a mixture of experts that is cut into pipeline stages, and trained."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import moe
import torch
from torch.utils.checkpoint import checkpoint

import polyshard as ps
from support.oracles.pipeline_training import micro_batches
from support.workers.pipelines import SGD, full_weights, mine, run_steps, start_built
from support.workers.pipelines import train as train_dense

BALANCE = ps.Balance(sequence=0.03, batch=0.05, z=0.01)


@dataclass(frozen=True)
class ExpertCase:
    """One run; `data` is the number of replicas with data of their own."""

    name: str
    directory: str
    plan: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=lambda: {"pipeline": 2, "expert": 2})
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "rows"
    layers: str = "torch"
    adapter: str = "torch"
    balance: ps.Balance = BALANCE
    data: int = 2
    checkpoints: bool = False  # each layer, by torch.utils.checkpoint and not by the engine
    checks: bool = False  # which experts are refused


def start(case, optimizer=SGD, timeout=90):
    """A context, and an engine around the stages with the weights of the directory."""
    return start_built(
        case, partial(ps.build_stages, partial(moe.build_model, balance=case.balance)), optimizer, timeout
    )


def train(cases):
    """Losses, evaluation losses, norms, weights, and the tokens of each router, of each case."""
    results = {}
    for case in cases:
        context, engine = start(case)
        figures = run_steps(context, engine, case.kind)
        tokens = {name: found.tokens for name, found in ps.router_statistics(engine.module, context).items()}
        results[case.name] = *figures, full_weights(engine, context), tokens
        engine.close()
        ps.shutdown(context)
    return results


def resumed(cases, results):
    """Three steps of AdamW with bias updates in the first case's layout, whose state is saved after two; the third one
    in each other layout, from that state. The weights after the third step are saved under the case's name.
    """
    config = ps.read_config(cases[0].directory)
    for index, case in enumerate(cases):
        context, engine = start(case, ps.AdamW(lr=1e-2))
        if index:
            ps.load_training_state(engine, f"{results}/state", context)
        for step in range(2 if index else 0, 3):
            engine.train_batch(mine(context, micro_batches(case.kind, step)))
            engine.step()
            ps.update_router_bias(engine.module, context)
            if step == 1:
                ps.save_training_state(engine, f"{results}/state", context, step=2, config=config)
        ps.save_checkpoint(engine, f"{results}/{case.name}", context, config=config)
        engine.close()
        ps.shutdown(context)


def train_all(dense, experts):
    """The results of pipelines of dense models, and of those with experts."""
    return train_dense(dense), train(experts)


def random_routes(case, context):
    """Random experts of each layer and token of this rank's micro-batches of the first step."""
    config, generator = ps.read_config(case.directory), torch.Generator().manual_seed(7)
    names = [f"model.layers.{i}.mlp" for i in range(config.num_hidden_layers) if i not in config.mlp_only_layers]
    routes = [
        {name: torch.rand(*batch["input_ids"].shape, 8, generator=generator).topk(2).indices for name in names}
        for batch in micro_batches(case.kind, 0)
    ]
    data = context.axis("data")
    return [
        {name: ps.context_shard(experts, context, dim=1) for name, experts in given.items()}
        for given in routes[data.rank :: data.size]
    ]


def replayed(cases):
    """Of each case: whether evaluations that record and replay have equal bits; the loss and the weights of a step with
    random experts; whether it has taken them; and what is said of experts that do not fit.
    """
    results = {}
    for case in cases:
        context, engine = start(case)
        if case.checkpoints:
            for layer in [layer for stage in engine.module for layer in stage.model.layers]:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        batches, routes = mine(context, micro_batches(case.kind, 0)), random_routes(case, context)
        with ps.record_routing(engine.module) as recorded:
            evaluated = engine.eval_batch(batches).loss
        with ps.replay_routing(engine.module, recorded):
            again = engine.eval_batch(batches).loss
        with ps.replay_routing(engine.module, routes), ps.record_routing(engine.module) as taken:
            loss = engine.train_batch(batches).loss.item()
        engine.step()
        assert len(taken) in (0, len(batches))
        same = context.layout.sequence_parallel or all(
            torch.equal(experts, given[name].flatten(0, -2))
            for own, given in zip(taken, routes)
            for name, experts in own.items()
        )
        weights = full_weights(engine, context)
        told = [said(engine, batches, wrong) for wrong in misfits(routes)] if case.checks else []
        if case.checks:
            told.append(said(engine, batches, None if context.axis("pipeline").rank else routes))
        results[case.name] = torch.equal(evaluated, again), loss, weights, same, told
        engine.close()
        ps.shutdown(context)
    return results


def misfits(routes):
    """Experts of too few micro-batches, of one token too few, and of a layer that the model does not have."""
    *_, name = routes[0]
    short = {**routes[1], name: routes[1][name][..., 1:, :]}
    unknown = [{**given, "model.layers.9.mlp": given[name]} for given in routes]
    return [routes[:1], [routes[0], short, *routes[2:]], unknown]


def said(engine, batches, routes):
    """The error of a step with these experts, or of one that replays none where they are None."""
    try:
        with nullcontext() if routes is None else ps.replay_routing(engine.module, routes):
            engine.train_batch(batches)
    except ps.ConfigurationError as error:
        return str(error)
    return None


def train_resume_and_replay(cases, resumes, results, replays):
    resumed(resumes, results)
    return train(cases), replayed(replays)


def train_and_refuse(cases, refused):
    """The results of each case on each rank, and what each refused one says."""
    results, told = train(cases), {}
    for case in refused:
        try:
            context, engine = start(case)
            engine.train_batch(mine(context, micro_batches(case.kind, 0)))
        except ps.ConfigurationError as error:
            told[case.name] = str(error)
    return results, told


def freezes(directory, culprit, timeout):
    """What this rank sees of another that freezes in the second step, between two exchanges of its experts."""
    context, engine = start(ExpertCase("1f1b", directory), timeout=timeout)
    batches = mine(context, micro_batches("rows", 0))
    engine.train_batch(batches)
    engine.step()
    if context.rank == culprit:
        (stage,) = engine.module
        list(stage.model.layers)[-1].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
    started = time.monotonic()
    try:
        engine.train_batch(batches)
    except ps.PolyshardError as error:
        return time.monotonic() - started, type(error).__name__, str(error), getattr(error, "ranks", ())
    return None
