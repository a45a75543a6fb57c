"""On each rank: what the pipelines of Megatron-Core and DeepSpeed refuse, and ranks that fail in one."""

import os
import time

import torch

import polyshard as ps
from support.oracles.pipeline_training import micro_batches
from support.workers.library_pipelines import LibraryCase
from support.workers.pipelines import full_weights, norms_and_all_reduces, start

ADAMW = ps.AdamW(lr=1e-2)
INTERLEAVED = "interleaved-1f1b"


def messages(directory):
    """What each setting says on this rank that a library does not support."""
    found = {}

    def attempt(name, action):
        try:
            action()
            found[name] = None
        except ps.PolyshardError as error:
            found[name] = str(error)

    refused = {
        "megatron, V": ("megatron", "zero-bubble-v", {}),
        "megatron, gpipe": ("megatron", "gpipe", {}),
        "deepspeed, interleaved": ("deepspeed", INTERLEAVED, {}),
        "deepspeed, zero 2": ("deepspeed", "1f1b", {"zero_stage": 2}),
        "deepspeed, zero 3": ("deepspeed", "1f1b", {"zero_stage": 3}),
        "deepspeed, offload": ("deepspeed", "1f1b", {"offload": "optimizer"}),
        "deepspeed, partitions": ("deepspeed", "1f1b", {"config": {"pipeline": {"pipe_partitioned": True}}}),
    }
    for name, (library, schedule, options) in refused.items():
        case = LibraryCase.of(library, name, directory, schedule, options=options)
        attempt(name, lambda case=case: start(case, ADAMW))
    for library, schedule in (("megatron", INTERLEAVED), ("deepspeed", "1f1b")):
        context, engine = start(LibraryCase.of(library, "1f1b", directory, schedule), ADAMW)
        batches = micro_batches("rows", 0)
        attempt(f"{library}, forward", lambda engine=engine, batches=batches: engine(**batches[0]))
        attempt(f"{library}, backward", lambda engine=engine: engine.backward(torch.zeros((), requires_grad=True)))
        attempt(f"{library}, accumulate", engine.accumulate)
        attempt(f"{library}, 3 micro-batches", lambda engine=engine, batches=batches: engine.train_batch(batches[:3]))
        found[f"{library}, training"] = skips_together(engine, context)
        engine.close()
        ps.shutdown(context)
    return found


def skips_together(engine, context):
    """Gradients of stage 0 that are not finite in the second step; then norms of one and two train_batch."""
    chosen = "model.layers.0.mlp.down_proj.weight"
    weight = next((p for name, p in engine.module.named_parameters() if engine.table[name].name == chosen), None)
    skipped, changed, before = [], [], full_weights(engine, context)
    engine.zero_grad()
    for step in range(3):
        hook = None if weight is None or step != 1 else weight.register_hook(lambda g: g * float("inf"))
        engine.train_batch(micro_batches("rows", step)[: 2 + step % 2 * 2])  # the number of micro-batches changes
        skipped.append(engine.step().skipped)
        if hook is not None:
            hook.remove()
        now = full_weights(engine, context)
        changed.append(any(not torch.equal(before[name], now[name]) for name in now))
        before = now
    engine.set_learning_rate(0.0)
    return skipped, changed, *norms_and_all_reduces(engine)


def fails(library, schedule, directory, how, timeout):
    """What this rank sees when the last stage dies, or its loss has no gradient, in the second step."""
    context, engine = start(LibraryCase.of(library, "failing", directory, schedule), ADAMW, timeout=timeout)
    batches = micro_batches("rows", 0)
    engine.train_batch(batches)
    engine.step()

    def loss(hidden, micro_batch):
        if how == "dies":
            os._exit(3)
        return torch.zeros(())

    started = time.monotonic()
    try:
        engine.train_batch(batches, loss)
    except ps.PolyshardError as error:
        seconds = time.monotonic() - started
        if context.rank == 1:
            time.sleep(timeout + 2)  # it lives on: the other must not wait for its end
        return seconds, type(error).__name__, str(error), getattr(error, "ranks", ())
    return None
