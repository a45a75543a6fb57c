"""Gradient norm and clipping where tensor-parallel ranks share a KV head; the oracle is transformers in float64."""

import pytest
import torch
import transformers
from support.models.tiny import VOCAB, save_tiny
from support.suite_engines import ENGINES
from support.workers.clipped import clipped_steps
from torch.nn import functional as F

from polyshard.testing import run_ranks

CLIP, STEPS = 0.05, 3


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A checkpoint with one KV head, batches, and what one process computes in float64."""
    directory = save_tiny(tmp_path_factory.mktemp("one_kv_head") / "model", "llama", num_key_value_heads=1)
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(0, VOCAB, (4, 12), generator=generator) for _ in range(STEPS)]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), eps=1.0, weight_decay=0.0)
    norms = []
    for rows in batches:
        logits = model(rows).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return directory, batches, norms, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("adapter", ENGINES)
def test_norm_and_clipped_weights_are_those_of_one_process(case, adapter):
    directory, batches, norms, weights = case
    engines = ENGINES[adapter]
    results = run_ranks(clipped_steps, 4, directory, batches, adapter, engines, CLIP)
    for index, options in enumerate(engines):
        for outcome in results:
            assert outcome[index][0] == pytest.approx(norms, rel=1e-5), options
        got = results[0][index][1]
        assert set(got) == set(weights)
        worst = max(float((got[name].double() - want).abs().max()) for name, want in weights.items())
        assert worst < 2e-6, options
