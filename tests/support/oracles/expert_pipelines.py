"""transformers in one process, trained by SGD at learning rate 1 with the balance losses of its routers: the oracle."""

from functools import cache

import pytest
import torch
from torch.nn import functional as F

from support.models.experts import load_reference
from support.oracles.pipeline_training import STEPS, micro_batches, sequences


def balance_losses(balance, replicas, per_token):
    """The balance loss of each replica's micro-batch, a mean over its tokens.

    `replicas` has, for each replica, the router's logits of each layer of each sequence.
    """
    losses = [0.0] * len(replicas)
    for layer in range(len(replicas[0][0])):
        logits = [[layers[layer] for layers in sequences] for sequences in replicas]
        experts = logits[0][0].shape[-1]

        def frequency(rows, experts=experts):
            chosen = torch.bincount(rows.topk(per_token).indices.flatten(), minlength=experts)
            return chosen.to(rows.dtype) / chosen.sum() * experts

        everywhere = frequency(torch.cat([torch.cat(rows) for rows in logits]))
        for index, rows in enumerate(logits):
            tokens = torch.cat(rows)
            of_sequences = [len(row) * (row.softmax(-1).mean(0) * frequency(row)).sum() for row in rows]
            losses[index] += (
                balance.z * tokens.logsumexp(-1).square().mean()
                + balance.batch * (tokens.softmax(-1).mean(0) * everywhere).sum()
                + balance.sequence * torch.stack(of_sequences).sum() / len(tokens)
            )
    return losses


@cache
def train(directory, kind, dtype, balance, data):
    """Losses without balance, gradient norms, and the weights after all steps, on `data` replicas."""
    model = load_reference(directory, dtype)
    per_token = model.config.num_experts_per_tok
    losses, norms = [], []
    for step in range(STEPS):
        batches = micro_batches(kind, step)
        count = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        total = 0.0
        for start in range(0, len(batches), data):  # micro-batches that the replicas compute at the same time
            routers, parts = [], []
            for batch in batches[start : start + data]:
                outputs = [(model(ids[None], output_router_logits=True), labels) for ids, labels in sequences(batch)]
                routers.append([output.router_logits for output, _ in outputs])
                parts.append(
                    sum(
                        F.cross_entropy(output.logits[0], labels, ignore_index=-100, reduction="sum")
                        for output, labels in outputs
                    )
                )
            loss = sum(parts) / count
            total += loss.item()
            for batch, extra in zip(batches[start : start + data], balance_losses(balance, routers, per_token)):
                loss = loss + extra * int((batch["labels"] != -100).sum()) / count
            loss.backward()
        losses.append(total)
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= parameter.grad
                    parameter.grad = None
    model.save_pretrained(folder := f"{directory}-{kind}-{dtype}-{data}")
    from safetensors.torch import load_file

    return losses, norms, load_file(f"{folder}/model.safetensors")


def judge(cases, results):
    """Assert that each case trained on all ranks as transformers, and that replicas hold equal experts."""
    for case in cases:
        losses, norms, exact = train(case.directory, case.kind, torch.float64, case.balance, case.data)
        rounded = train(case.directory, case.kind, torch.float32, case.balance, case.data)[2]
        # Four times as far from float64 as transformers in float32, which sums in another order.
        allowed = max(1e-6, 4 * max(float((rounded[name] - exact[name]).abs().max()) for name in exact))
        found = {}
        for result in results:
            got, evaluated, got_norms, weights, loads = result[case.name]
            assert got == pytest.approx(losses, rel=2e-6), case.name
            assert evaluated == pytest.approx(got, rel=1e-6), case.name
            assert got_norms == pytest.approx(norms, rel=1e-4), case.name
            tokens = sum(b["input_ids"].numel() for step in range(STEPS) for b in micro_batches(case.kind, step))
            assert set(loads.values()) == {tokens}, f"{case.name}: every rank knows the routers of all stages"
            for name, weight in weights.items():
                gap = float((weight.double() - exact[name]).abs().max())
                assert gap <= allowed, f"{case.name}: {name} by {gap}"
                assert torch.equal(weight, found.setdefault(name, weight)), f"{case.name}: {name} differs over ranks"
        assert found.keys() == exact.keys(), case.name
