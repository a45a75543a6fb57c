"""On each rank: pipelines that run on the schedules of Megatron-Core and DeepSpeed."""

from dataclasses import dataclass

import torch

import polyshard as ps
from polyshard.adapters.megatron.model_groups import ModelGroups
from support.workers.pipelines import SGD, Case

# DistributedOptimizer has Adam only. With such an epsilon its update is the gradient: SGD at learning rate 1.
ADAM_AS_SGD = ps.AdamW(lr=1e8, eps=1e8, betas=(0.0, 0.0), weight_decay=0.0)
# Layer 0 is in a parameter group that later stages lack, with the same rate up to rounding.
GROUPED_SGD = ps.TorchOptimizer(
    torch.optim.SGD, lr=1.0, weight_decay=0.0, groups=(ps.ParameterGroup("*layers.0.*", lr_scale=1 + 1e-9),)
)


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
        return ADAM_AS_SGD if sharded else GROUPED_SGD if self.adapter == "deepspeed" else SGD


def in_bfloat16(function, *arguments):
    """Call a function that builds models, whose parameters are then in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return function(*arguments)
    finally:
        torch.set_default_dtype(before)


def groups_of_engines(count):
    """The sums over the model's ranks by the groups of Megatron engines, each closed when the next one is built."""
    context = ps.initialize("megatron", pipeline=2, timeout=60)
    sums, earlier = [], []
    for _ in range(count):
        earlier.append(ModelGroups.of(context))
        total = torch.ones(1)
        torch.distributed.all_reduce(total, group=earlier[-1].model)
        sums.append(float(total))
        for groups in earlier[:-1]:
            groups.close()
        del earlier[:-1]
    ps.shutdown(context)
    return sums
