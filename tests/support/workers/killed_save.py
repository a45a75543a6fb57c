"""Saving over and over on ranks of which one is killed."""

import os
import threading
import time

import torch

import polyshard as ps
from polyshard.adapters.torch import failure
from polyshard.testing.model import SuiteConfig, SuiteModel

SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_layers": 4}


def fill(model, context, value):
    """Every element of the logical model is `value`."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def save_until_hit(directory, start, victim, after, share, how, timeout, patience):
    """Save training states in which every weight equals the step.

    `victim` is hit by a signal when `after` saves are done, and that `share` of the time of the last one is over: so a
    slow machine is hit at the same moments as a fast one.
    """
    failure.PATIENCE = patience  # how long a survivor looks for the culprit
    context = ps.initialize("torch", tensor=2, timeout=timeout)
    model = SuiteModel(SuiteConfig(**SIZES), context)
    engine = ps.load_adapter("torch").engine(model, ps.AdamW(), context)
    began = time.monotonic()
    step, last = start, 0.2
    try:
        while time.monotonic() - began < 30:
            if context.rank == victim and step - start == after:
                timer = threading.Timer(share * last, lambda: os.kill(os.getpid(), how))
                timer.daemon = True
                timer.start()
            step += 1
            fill(model, context, step)
            last = -time.monotonic()
            ps.save_training_state(engine, directory, context, step=step, config={})
            last += time.monotonic()
    except ps.PolyshardError as error:
        return step, type(error).__name__, str(error), time.monotonic() - began
    return step, None, "", time.monotonic() - began
