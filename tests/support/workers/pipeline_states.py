"""On each rank: pipelines that save, resume, and read what others saved."""

from pathlib import Path

import decoder
import torch

import polyshard as ps
from support.oracles.pipeline_training import micro_batches
from support.workers.pipelines import full_weights, mine, start

ADAMW = ps.AdamW(lr=1e-2)


def steps(engine, context, first, last):
    losses = []
    for step in range(first, last):
        losses.append(engine.train_batch(mine(context, micro_batches("rows", step))).loss.item())
        engine.step()
    return losses


def save_and_go_on(cases, folder):
    """Per case: losses and weights of four steps, saved after two; and of the last two again, resumed."""
    found = {}
    for case in cases:
        state = Path(folder) / case.name
        config = ps.read_config(case.directory)
        context, engine = start(case, ADAMW)
        ps.manual_seed(3, context)
        losses = steps(engine, context, 0, 2)
        ps.save_training_state(engine, state / "state", context, step=2, config=config, data=context.rank)
        ps.save_checkpoint(engine, state / "weights", context, config=config)
        drawn = torch.rand(2)
        losses += steps(engine, context, 2, 4)
        weights = full_weights(engine, context)
        ps.shutdown(context)

        context, engine = start(case, ADAMW)
        restored = ps.load_training_state(engine, state / "state", context)
        again = torch.rand(2)
        resumed = steps(engine, context, 2, 4)
        weights_again = full_weights(engine, context)
        ps.shutdown(context)
        found[case.name] = {
            "losses": losses,
            "resumed": losses[:2] + resumed,
            "weights": weights,
            "again": weights_again,
            "carried": sorted(restored.carried),
            "draws": (drawn, again),
        }
    return found


def read(cases, folder):
    """Per case (what reads, what is read): losses after loading the state; and the weights, saved again."""
    found = {}
    for case, source in cases:
        context, engine = start(case, ADAMW)
        ps.load_training_state(engine, Path(folder) / source / "state", context)
        found[case.name, source] = steps(engine, context, 2, 4)
        config = ps.read_config(case.directory)
        model = ps.build_stages(decoder.build_model, config, context)
        ps.load_checkpoint(model, Path(folder) / source / "weights", context)
        ps.save_checkpoint(model, Path(folder) / source / f"by {case.name}", context, config=config)
        ps.shutdown(context)
    return found


def curve(case, count):
    """Losses of many steps of AdamW."""
    context, engine = start(case, ps.AdamW(lr=1e-3, weight_decay=0.1))
    losses = []
    for step in range(count):
        batches = micro_batches("rows", step % 3)[:2]
        losses.append(engine.train_batch(batches).loss.item())
        engine.step()
    ps.shutdown(context)
    return losses
