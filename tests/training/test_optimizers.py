"""Optimizers, parameter groups and frozen parameters on every engine; the oracle is torch in float64 on transformers.

One run moves through all engines, one step on each: state, rates and schedule go with it.
"""

from fnmatch import fnmatch

import pytest
import torch
import transformers
from support.models.tiny import save_tiny
from support.workers.optimizers import moving_run, rows_of, warmup
from torch.nn import functional as F

import polyshard as ps
from polyshard.testing import run_ranks

FROZEN = ("model.embed_tokens*", "*layers.0.mlp.down_proj*")
GROUPS = (
    ps.ParameterGroup("*norm*", lr_scale=0.25, weight_decay=0.3),
    ps.ParameterGroup("lm_head*", lr_scale=2.0, weight_decay=0.0),
)
# With eps of 1, Adam's update is in proportion to the gradient, so that a wrong factor shows.
ADAMW = ps.AdamW(lr=0.5, eps=1.0, weight_decay=0.1, groups=GROUPS)
SGD = ps.TorchOptimizer(torch.optim.SGD, lr=0.5, momentum=0.9, weight_decay=0.1, groups=GROUPS)
DDP, FSDP, *ZERO = {"data_parallel": "ddp"}, {"data_parallel": "fsdp"}, *({"zero_stage": stage} for stage in range(4))
PLACES = [  # data 2, and tensor 2 in between
    *(("torch", 1, FSDP), ("megatron", 1, ZERO[0]), ("deepspeed", 1, ZERO[3]), ("fairscale", 1, ZERO[1])),
    *(("torch", 2, DDP), ("deepspeed", 1, ZERO[1]), ("megatron", 2, ZERO[0]), ("fairscale", 1, ZERO[2])),
    *(("deepspeed", 1, ZERO[0]), ("torch", 1, DDP), ("deepspeed", 1, ZERO[2]), ("torch", 1, FSDP)),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("optimizers") / "model", "llama")


def in_one_process(directory, optimizer, frozen, steps):
    """Gradient norms, and the weights after each step."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    groups = []
    for name, parameter in model.named_parameters():
        if any(fnmatch(name, pattern) for pattern in frozen):
            parameter.requires_grad_(False)
            continue
        lr, decay = 0.5, 0.1 if parameter.dim() == 2 else 0.0
        if "norm" in name:
            lr, decay = 0.125, 0.3
        elif name.startswith("lm_head"):
            lr, decay = 1.0, 0.0
        groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    if optimizer is ADAMW:
        made = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1.0, fused=False)
    else:
        made = torch.optim.SGD(groups, momentum=0.9)
    scheduler = warmup(made)
    outcomes = []
    for step in range(steps):
        rows = rows_of(step)
        F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        made.step()
        scheduler.step()
        made.zero_grad()
        outcomes.append((norm, {name: p.detach().clone() for name, p in model.named_parameters()}))
    return outcomes


@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_groups_frozen_weights_and_schedule_go_through_every_engine(directory, optimizer, tmp_path):
    places = PLACES
    if optimizer is ADAMW:
        places = [(n, t, ZERO[1] if (n, t) == ("megatron", 2) else options) for n, t, options in PLACES]
    outcomes = run_ranks(moving_run, 2, directory, tmp_path, places, optimizer, FROZEN, timeout=280)[0]
    for place, (norm, weights), (norm64, weights64) in zip(
        places, outcomes, in_one_process(directory, optimizer, FROZEN, len(places)), strict=True
    ):
        assert norm == pytest.approx(norm64, rel=2e-5), place
        assert weights.keys() == weights64.keys()
        for name, value in weights.items():
            assert (value.double() - weights64[name]).abs().max() < 5e-6, (place, name)
    start = dict(transformers.AutoModelForCausalLM.from_pretrained(directory).named_parameters())
    unmoved = [name for name, value in outcomes[-1][1].items() if torch.equal(value, start[name])]
    assert unmoved == ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"]
