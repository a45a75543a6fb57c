"""A hundred training steps of a mixture of experts lie on the curve of transformers."""

import moe
import torch
from support.models.experts import VOCAB, load_reference, save_moe
from torch.nn import functional as F

import polyshard as ps

STEPS, RATE = 100, 0.5


def rows(step):
    """Rows of which every token follows from the one before, so that there is something to learn."""
    start = torch.randint(VOCAB, (4, 1), generator=torch.Generator().manual_seed(step))
    ids = (start + 7 * torch.arange(17)) % VOCAB
    return ids[:, :-1], ids[:, 1:]


def losses_of(forward, parameters):
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    found = []
    for step in range(STEPS):
        ids, labels = rows(step)
        loss = F.cross_entropy(forward(ids).flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def test_the_losses_of_a_hundred_steps_are_those_of_transformers(tmp_path):
    """In float64, in which no expert flips by rounding."""
    directory = save_moe(tmp_path / "model", "qwen3_moe")
    reference = load_reference(directory, torch.float64)
    expected = losses_of(lambda ids: reference(ids).logits, reference.parameters())
    context = ps.initialize("torch")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = moe.build_model(ps.read_config(directory), context)
        ps.load_checkpoint(model, directory, context)
        losses = losses_of(lambda ids: model.compute_logits(model(ids)), model.parameters())
    finally:
        torch.set_default_dtype(before)
    assert expected[-10:].mean() < 0.1 * expected[:10].mean()
    # transformers' norms are float32; the curves are 1.4e-6 apart.
    torch.testing.assert_close(losses, expected, rtol=2e-5, atol=0)
