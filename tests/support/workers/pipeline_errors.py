"""On each rank: pipelines that are wrong, and ranks that fail in one."""

import os
import signal
import time
from itertools import pairwise

import pytest
import torch
from torch import nn

import polyshard as ps
from support.models.tiny import VOCAB
from support.oracles.pipeline_training import micro_batches
from support.workers.pipelines import SGD, Case, full_weights, norms_and_all_reduces, start


class Layers(nn.Module):
    """A model of linear layers that builds those that `choose` says, whatever the stage."""

    def __init__(self, choose, context, extra=()):
        super().__init__()
        self.stage = ps.pipeline_stage(4, context)
        self.layers = nn.ModuleDict({str(i): nn.Linear(4, 4) for i in choose(self.stage, context)})
        for name in extra:
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, input_ids, inputs_embeds=None):
        return inputs_embeds


FACTORIES = {
    "missing": lambda _, c: Layers(lambda s, _: list(s.layers)[:-1] if s.last else s.layers, c),
    "hole": lambda _, c: Layers(lambda s, _: s.layers if s.last else list(s.layers)[:-1], c),
    "doubled": lambda _, c: Layers(lambda s, _: [*s.layers, 2], c),
    "full": lambda _, c: Layers(lambda s, _: range(4), c),
    "norm": lambda _, c: Layers(lambda s, _: s.layers, c, extra=("norm",)),
}


def _raises(_, context):
    if context.axis("pipeline").rank == 1:
        raise KeyError("no such layer")
    return FACTORIES["norm"](_, context)


def _count(micro_batch):
    raise KeyError("mask")


def messages(directory):
    """What each mistake says on this rank."""
    found = {}

    def attempt(name, action):
        try:
            action()
            found[name] = None
        except (ps.PolyshardError, KeyError, TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    context = ps.initialize("torch", pipeline=2, timeout=60)
    for name, factory in FACTORIES.items():
        attempt(name, lambda factory=factory: ps.build_stages(factory, None, context))
    attempt("shared", lambda: ps.build_stages(FACTORIES["norm"], None, context, shared=("norm.*",)))
    attempt("raises", lambda: ps.build_stages(_raises, None, context))
    attempt("plan of three ranks", lambda: ps.build_stages(FACTORIES["norm"], None, context, ps.pipeline_plan(4, 3)))
    attempt("plan of five layers", lambda: ps.build_stages(FACTORIES["norm"], None, context, ps.pipeline_plan(5, 2)))
    attempt(
        "full, without build_stages",
        lambda: ps.load_adapter("torch").engine(FACTORIES["full"](None, context), SGD, context),
    )
    stages = ps.build_stages(lambda _, c: Layers(lambda s, _: s.layers, c), None, context)
    stages.requires_grad_(context.axis("pipeline").rank == 0)
    attempt("nothing to train", lambda: ps.load_adapter("torch").engine(stages, SGD, context))
    ps.shutdown(context)

    context, engine = start(Case("1f1b", directory))
    batches = micro_batches("rows", 0)
    last = context.axis("pipeline").rank == 1
    attempt("forward", lambda: engine(**batches[0]))
    attempt("backward", lambda: engine.backward(torch.zeros((), requires_grad=True)))
    attempt("accumulate", engine.accumulate)
    attempt("empty", lambda: engine.train_batch([]))
    attempt("other data", lambda: engine.train_batch(micro_batches("rows", int(last))))
    attempt("fewer micro-batches", lambda: engine.train_batch(batches[int(last) :]))
    attempt(
        "no input_ids", lambda: engine.train_batch([{"x": batches[0]["input_ids"], "labels": batches[0]["labels"]}])
    )
    attempt("unknown argument", lambda: engine.train_batch([{**batches[0], "colour": torch.zeros(2, 16)}]))
    mixed = [batches[0], micro_batches("packed", 0)[0]]
    attempt("rows and packed tokens", lambda: engine.train_batch(mixed))
    wide = [batches[0], {**micro_batches("ragged rows", 0)[0], "mask": torch.zeros(3)}]
    attempt("cannot be padded", lambda: engine.train_batch([{**batches[0], "mask": torch.zeros(3)}, wide[1]]))
    attempt("labels of one rank", lambda: engine.train_batch([{**batches[0], "labels": [1]} if last else batches[0]]))
    attempt("count of one rank", lambda: engine.train_batch(batches, None, _count if last else None))
    outside = {**batches[0], "labels": torch.full_like(batches[0]["labels"], VOCAB)}
    attempt("label outside", lambda: engine.train_batch([batches[0], outside]))
    calls = []

    def loss(hidden, micro_batch):
        calls.append(len(micro_batch))
        return hidden.sum()

    engine.train_batch(batches, loss)
    found["calls of the loss"] = len(calls)
    ps.shutdown(context)
    context, engine = start(Case("replicas", directory, sizes={}))
    attempt("label of one replica", lambda: engine.train_batch([outside if last else batches[0]]))
    attempt("tuple of one replica", lambda: engine.eval_batch([tuple(batches) if last else batches[0]]))
    engine.train_batch(batches)
    ps.shutdown(context)
    context, engine = start(Case("interleaved", directory, {"schedule": "interleaved-1f1b"}))
    attempt("interleaved, five micro-batches", lambda: engine.train_batch([*batches, batches[0]]))
    ps.shutdown(context)
    for name, options in (("recompute", {"recompute": "selective"}), ("unknown", {"data_parallel": "zero"})):
        attempt(
            name, lambda options=options: start(Case("v", directory, {"schedule": "zero-bubble-v"}, options=options))
        )
    return found


def skips_together(directory):
    """Gradients of stage 0 that are not finite in the second step; two train_batch before the third."""
    context, engine = start(Case("1f1b", directory, {"schedule": "1f1b"}), ps.AdamW(lr=1e-2))
    first = context.axis("pipeline").rank == 0
    weight = dict(engine.module.named_parameters())["model.layers.0.mlp.down_proj.weight"] if first else None
    skipped, weights = [], []
    for step in range(3):
        hook = None if weight is None or step != 1 else weight.register_hook(lambda g: g * float("inf"))
        engine.train_batch(micro_batches("rows", step))
        skipped.append(engine.step().skipped)
        if hook is not None:
            hook.remove()
        weights.append(full_weights(engine, context))
    changed = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(weights)]
    engine.set_learning_rate(0.0)
    norms, numbers = norms_and_all_reduces(engine)
    ps.shutdown(context)
    return skipped, changed, engine.updates, norms, numbers


def fails(directory, how, culprit, timeout):
    """What this rank sees of another that fails in the third step."""
    context, engine = start(Case("1f1b", directory, sizes={"pipeline": 3}), timeout=timeout)
    batches = micro_batches("rows", 0)
    engine.train_batch(batches)
    engine.step()
    if context.rank == culprit:
        (stage,) = engine.module
        forward, calls = stage.forward, []

        def failing(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                if how == "raises":
                    raise ValueError("the tokens are wrong")
                if how == "dies":
                    os._exit(3)
                os.kill(os.getpid(), signal.SIGSTOP)
            return forward(*args, **kwargs)

        stage.forward = failing
    started = time.monotonic()
    try:
        engine.train_batch(batches)
    except (ps.PolyshardError, ValueError) as error:
        seconds = time.monotonic() - started
        told = seconds, type(error).__name__, str(error), getattr(error, "ranks", ())
        if how == "raises" and context.rank == culprit:
            with pytest.raises(ps.RankFailureError) as again:
                engine.train_batch(batches)
            time.sleep(timeout + 2)  # it lives on: the others must not wait for its end
            return *told, str(again.value)
        return told
    return None
