"""Losses, bias updates and statistics that balance the load of experts."""

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import polyshard as ps

CONTEXT = ps.initialize("torch")
SIGMOID = ps.Router(score="sigmoid", normalize=True, correction_bias=True)


def layer(balance, router=None, per_token=2):
    torch.manual_seed(0)
    return ps.mixture_of_experts(16, 8, 4, per_token, CONTEXT, router=router, balance=balance)


def loss_of(ours, x, **options):
    ours(x, **options)
    return ps.router_loss(ours)


def test_loss_over_the_batch_is_that_of_transformers_per_expert_taken():
    ours, x = layer(ps.Balance(batch=1.0)), torch.randn(3, 7, 16)
    loss = loss_of(ours, x)
    theirs = load_balancing_loss_func((ours.gate(x).flatten(0, 1),), 4, 2) / 2
    torch.testing.assert_close(loss, theirs)
    gradients = [torch.autograd.grad(value, ours.gate.weight)[0] for value in (loss, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("packed", [False, True])
def test_loss_of_sequences_is_the_mean_over_their_tokens(packed):
    ours, x = layer(ps.Balance(sequence=0.5), SIGMOID), torch.randn(2, 6, 16)
    rows = (x[0], x[1, :3]) if packed else (x[0], x[1])
    each = [loss_of(ours, row) * len(row) for row in rows]
    bounds = torch.tensor([0, 6, 9])
    loss = loss_of(ours, torch.cat(rows), cu_seqlens=bounds) if packed else loss_of(ours, x)
    torch.testing.assert_close(loss, sum(each) / sum(map(len, rows)))


def test_formula_of_deepseek():
    ours, x = layer(ps.Balance(sequence=1.0), SIGMOID), torch.randn(9, 16)
    loss = loss_of(ours, x)
    scores = ours.gate(x).sigmoid()
    chosen = scores.topk(2).indices
    f = torch.stack([(chosen == e).sum() * 4 / (2 * 9) for e in range(4)])
    p = (scores / scores.sum(-1, keepdim=True)).mean(0)
    torch.testing.assert_close(loss, (f * p).sum())


def test_z_loss():
    ours, x = layer(ps.Balance(z=0.1)), torch.randn(5, 16)
    torch.testing.assert_close(loss_of(ours, x), 0.1 * ours.gate(x).logsumexp(-1).square().mean())


def test_a_balance_loss_that_is_not_taken_is_named_once(caplog):
    ours, x = layer(ps.Balance(z=0.1)), torch.randn(5, 16)
    for _ in range(3):
        ours(x)
    assert [record.message for record in caplog.records if "balance loss" in record.message] == [
        "the balance loss of a mixture of experts was not added to the model's loss. Use engine.train_batch, or add "
        "polyshard.router_loss(model) to the loss"
    ]
    ours.eval()
    ps.router_loss(ours)
    assert loss_of(ours, x) is None


def test_train_batch_adds_the_loss_weighted_by_tokens():
    ours = layer(ps.Balance(batch=1.0))
    engine = ps.load_adapter("torch").engine(ours, ps.AdamW(), CONTEXT)
    parts = [torch.randn(4, 16), torch.randn(12, 16)]
    engine.train_batch(
        [{"x": x} for x in parts], loss=lambda y, b: y.sum() * 0.0, tokens=lambda b: torch.tensor(len(b["x"]))
    )
    found = ours.gate.weight.grad.clone()
    ours.zero_grad()
    for x in parts:
        (loss_of(ours, x) * len(x) / 16).backward()
    torch.testing.assert_close(found, ours.gate.weight.grad)


def test_bias_updates_balance_a_router_that_prefers_one_expert():
    ours = layer(ps.Balance(bias_rate=0.01), SIGMOID)
    with torch.no_grad():
        ours.gate.weight[0] += 0.5
    x = torch.randn(256, 16) + 0.5
    ours(x)
    before = ps.router_statistics(ours, CONTEXT)[""]
    for _ in range(100):
        ps.update_router_bias(ours, CONTEXT)
        ours(x)
    ps.router_statistics(ours, CONTEXT)
    ours(x)
    after = ps.router_statistics(ours, CONTEXT)[""]
    assert before.imbalance > 1.5
    assert after.imbalance < 1.1
    assert (after.tokens, int(after.load.sum())) == (256, 512)
    with pytest.raises(ps.ConfigurationError, match=r"Balance.bias_rate, but no bias. Set Router\(correction_bias"):
        ps.update_router_bias(layer(ps.Balance(bias_rate=0.01)), CONTEXT)


def test_entropy_of_a_router_without_preference():
    ours = layer(ps.Balance())
    with torch.no_grad():
        ours.gate.weight.zero_()
    ours(torch.randn(5, 16))
    assert ps.router_statistics(ours, CONTEXT)[""].entropy == pytest.approx(math.log(4))
    assert ps.router_statistics(ours, CONTEXT) == {}


def test_negative_coefficients_are_refused():
    with pytest.raises(ps.ConfigurationError, match=r"Balance.z is invalid: got -1"):
        ps.Balance(z=-1)
