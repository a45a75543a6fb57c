"""transformers in one process, trained by SGD at learning rate 1 on the tokens of all micro-batches: the oracle.

A gradient error shows at full size in the weights, which an adaptive optimizer would hide.
"""

from functools import cache

import pytest
import torch
import transformers
from torch.nn import functional as F

from support.models.tiny import VOCAB

STEPS = 3
COUNT = 4  # micro-batches of a step


def micro_batches(kind, step):
    """The micro-batches of a step: labels are uneven, and some micro-batches have few."""
    generator = torch.Generator().manual_seed(step)

    def tokens(*shape):
        return torch.randint(VOCAB, shape, generator=generator)

    found = []
    for index in range(COUNT):
        if kind in ("rows", "steps of unequal lengths"):
            length = 16 if kind == "rows" else (16, 12, 20)[step]
            ids, labels = tokens(2, length), tokens(2, length)
            labels[:, : 5 * index] = -100
            found.append({"input_ids": ids, "labels": labels})
        elif kind == "ragged rows":
            shape = (1 + index % 3, 8 + 2 * ((index + step) % 4))
            found.append({"input_ids": tokens(*shape), "labels": tokens(*shape)})
        else:  # packed, each micro-batch with other boundaries
            total = 24 if kind == "packed" else 20 + 4 * ((3 * index + step) % 5)
            cut = int(torch.randint(1, total, (1,), generator=generator))
            ids, labels = tokens(total), tokens(total)
            labels[cut - 1], labels[-1] = -100, -100
            labels[: 5 * index] = -100
            positions = torch.cat([torch.arange(cut), torch.arange(total - cut)])
            cu_seqlens = torch.tensor([0, cut, total], dtype=torch.int32)
            found.append({"input_ids": ids, "labels": labels, "positions": positions, "cu_seqlens": cu_seqlens})
    return found


def sequences(micro_batch):
    """The token IDs and labels of each sequence."""
    ids, labels = micro_batch["input_ids"], micro_batch["labels"]
    if ids.dim() == 2:
        return list(zip(ids, labels))
    sizes = micro_batch["cu_seqlens"].diff().tolist()
    return list(zip(ids.split(sizes), labels.split(sizes)))


@cache
def train(directory, kind, dtype, clip=None):
    """Losses, gradient norms, and the weights after all steps, whose gradients are clipped to the norm `clip`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    losses, norms = [], []
    for step in range(STEPS):
        parts = [part for micro_batch in micro_batches(kind, step) for part in sequences(micro_batch)]
        count = sum(int((labels != -100).sum()) for _, labels in parts)
        total = 0.0
        for ids, labels in parts:
            loss = F.cross_entropy(model(ids[None]).logits[0], labels, ignore_index=-100, reduction="sum") / count
            loss.backward()
            total += loss.item()
        losses.append(total)
        if clip is None:
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        else:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= parameter.grad
                parameter.grad = None
    return losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


@cache
def allowed(directory, kind):
    """Four times as far from float64 as transformers in float32, which sums in another order; at least 1e-6."""
    exact, rounded = (train(directory, kind, dtype)[2] for dtype in (torch.float64, torch.float32))
    return max(1e-6, 4 * max(float((rounded[name] - exact[name]).abs().max()) for name in exact))


def judge(cases, results):
    """Assert that each case trained on all ranks as transformers, and that copies of the embedding are equal."""
    for case in cases:
        clip = case.options.get("max_grad_norm")
        losses, norms, weights = train(case.directory, case.kind, torch.float64, clip)
        held = set()
        for result in results:
            got, evaluated, got_norms, got_weights = result[case.name]
            assert got == pytest.approx(losses, rel=2e-6), case.name
            assert evaluated == pytest.approx(got, rel=1e-6), case.name
            assert got_norms == pytest.approx(norms, rel=1e-4), case.name
            for name, weight in got_weights.items():
                gap = float((weight.double() - weights[name]).abs().max())
                assert gap <= allowed(case.directory, case.kind), f"{case.name}: {name} by {gap}"
            held |= got_weights.keys()
        assert held == weights.keys(), case.name
        embeddings = [result[case.name][3].get("model.embed_tokens.weight") for result in results]
        copies = [embedding for embedding in embeddings if embedding is not None]
        assert all(torch.equal(copy, copies[0]) for copy in copies), f"{case.name}: copies of the embedding differ"
