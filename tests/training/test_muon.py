"""Muon on every engine that has whole matrices at hand; the oracle is torch's Muon on transformers in one process."""

import pytest
import torch
import transformers
from support.models.tiny import save_tiny
from support.workers.optimizers import moving_run, rows_of, warmup
from torch.nn import functional as F

import polyshard as ps
from polyshard.testing import run_ranks

EXCLUDE = ("*embed_tokens*", "lm_head*")
MUON = ps.Muon(exclude=EXCLUDE, lr=0.05, weight_decay=0.1, adamw=ps.AdamW(lr=0.01, eps=1e-2))
# Muon rounds to bfloat16 and amplifies it: in one process, float32 and float64 are up to 0.04 apart.
BAND = 0.08
PLACES = [
    ("torch", 2, {"data_parallel": "fsdp"}),
    ("deepspeed", 2, {"zero_stage": 0}),
    ("fairscale", 2, {"zero_stage": 2}),
    ("torch", 1, {"data_parallel": "ddp"}),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("muon") / "model", "llama", num_key_value_heads=1)


def in_one_process(directory, steps):
    """The weights before and after each step, with each matrix of transformers' model by itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if p.dim() == 2 and "embed" not in n and "lm_head" not in n]
    known = {id(p) for p in matrices}
    rest = [{"params": [p], "weight_decay": 0.1 * (p.dim() == 2)} for p in named.values() if id(p) not in known]
    muon = torch.optim.Muon(matrices, lr=0.05, weight_decay=0.1)
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), eps=1e-2)
    schedulers = [warmup(muon), warmup(adamw)]
    weights = [{name: p.detach().clone() for name, p in named.items()}]
    for step in range(steps):
        rows = rows_of(step)
        F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for part in (muon, adamw, *schedulers):
            part.step()
        model.zero_grad()
        weights.append({name: p.detach().clone() for name, p in named.items()})
    return weights


def test_the_update_of_a_matrix_is_that_of_one_process(directory, tmp_path):
    outcomes = run_ranks(moving_run, 4, directory, tmp_path, PLACES, MUON, timeout=280)[0]
    weights = in_one_process(directory, len(PLACES))
    for step, (place, (_, got)) in enumerate(zip(PLACES, outcomes)):
        for name, before in weights[0].items():
            moved, wanted = got[name] - before, weights[step + 1][name] - before
            assert (moved - wanted).norm() < BAND * wanted.norm(), (place, name)


def test_updates_of_shards_or_of_a_fused_layer_leave_the_band():
    """What is refused, or gathered: Muon on the halves of a matrix, and on two matrices as one."""
    gradient = torch.randn(48, 40, generator=torch.Generator().manual_seed(0))

    def update(part):
        parameter = torch.nn.Parameter(torch.zeros_like(part))
        parameter.grad = part.clone()
        torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0).step()
        return parameter.detach()

    whole, halves = update(gradient), torch.cat([update(half) for half in gradient.chunk(2)])
    assert (whole - halves).norm() > 4 * BAND * whole.norm()


def test_what_muon_cannot_update_is_refused(directory):
    context = ps.initialize("deepspeed")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ps.ConfigurationError, match="Muon needs whole matrices: got an engine that updates runs of"):
        ps.load_adapter("deepspeed").engine(model, ps.Muon(exclude=()), context, zero_stage=1)
    ps.shutdown(context)
    with pytest.raises(ps.ConfigurationError, match=r"got weight with shape \(2, 2, 3\), expected two dimensions"):
        ps.Muon(exclude=())(torch.nn.Conv1d(2, 2, 3).named_parameters())
    with pytest.raises(ps.ConfigurationError, match=r"Muon.adamw has groups"):
        ps.Muon(exclude=(), adamw=ps.AdamW(groups=(ps.ParameterGroup("*"),)))
