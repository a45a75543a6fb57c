"""What tests run of nanoGPT's and torchtitan's files on two ranks."""

from importlib import import_module

import polyshard as ps


def losses_over_two(module, config, checkpoint, adapter, ids, labels):
    context = ps.initialize(adapter, tensor=2, timeout=60)
    model = import_module(module).build_model(config, context)
    ps.load_checkpoint(model, checkpoint, context)
    loss = float(model(ids, labels=labels))
    ps.shutdown(context)
    return loss
