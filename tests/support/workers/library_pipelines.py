"""On each rank: pipelines that run on the schedules of Megatron-Core and DeepSpeed."""

from dataclasses import dataclass

import torch

import polyshard as ps
from support.oracles.pipeline_training import STEPS, micro_batches
from support.workers.pipelines import SGD, Case, full_weights, mine, start

# DistributedOptimizer has Adam only. With such an epsilon its update is the gradient: SGD at learning rate 1.
ADAM_AS_SGD = ps.AdamW(lr=1e8, eps=1e8, betas=(0.0, 0.0), weight_decay=0.0)


@dataclass(frozen=True)
class LibraryCase(Case):
    """A run on the library of the adapter, with its layers."""

    @classmethod
    def of(cls, library, name, directory, schedule="1f1b", **fields):
        fields["plan"] = {"schedule": schedule, **fields.get("plan", {})}
        return cls(f"{library}, {name}", directory, adapter=library, layers=library, **fields)

    @property
    def optimizer(self):
        sharded = self.adapter == "megatron" and self.options.get("zero_stage", 1) == 1
        return ADAM_AS_SGD if sharded else SGD


def train(cases):
    """Losses, evaluation losses, norms and weights of each case."""
    results = {}
    for case in cases:
        context, engine = start(case, case.optimizer)
        losses, evaluated, norms = [], [], []
        for step in range(STEPS):
            batches = mine(context, micro_batches(case.kind, step))
            evaluated.append(engine.eval_batch(batches).loss.item())
            losses.append(engine.train_batch(batches).loss.item())
            norms.append(engine.step().grad_norm)
        results[case.name] = losses, evaluated, norms, full_weights(engine, context)
        engine.close()
        ps.shutdown(context)
    return results


def in_bfloat16(function, *arguments):
    """Call a function that builds models, whose parameters are then in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return function(*arguments)
    finally:
        torch.set_default_dtype(before)
