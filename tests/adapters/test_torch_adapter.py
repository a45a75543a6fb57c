"""decoder.py on the torch adapter against transformers' own implementation of the same architecture.

The bound is float32 rounding, measured and not guessed: the reference is transformers in float64, and transformers in
float32 shows how far rounding alone moves each quantity from it. polyshard sums in another order, so it may be up to
four times as far (observed: at most about twice), with a floor of a few units in the last place.
"""

import pytest
import torch
import transformers
from support.models.tiny import VOCAB, save_tiny
from support.oracles.transformers_reference import (
    MODELS,
    assert_equal_to_reference,
    batch,
    reference,
)
from support.workers.on_ranks import loss_and_gradients, training_curve
from torch.nn import functional as F

from polyshard.testing import run_ranks


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "sizes",
    [{"tensor": 1}, {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}],
    ids=["1", "2", "2-sequence"],
)
def test_logits_loss_and_every_gradient_equal_transformers(tmp_path, model, sizes):
    kind, changes = MODELS[model]
    directory = save_tiny(tmp_path / "model", kind, **changes)
    input_ids, labels = batch()
    expected = reference(directory, input_ids, labels)
    results = run_ranks(
        loss_and_gradients, sizes["tensor"], directory, {"input_ids": input_ids, "labels": labels}, sizes
    )
    assert_equal_to_reference(results[0], expected)
    assert all(abs(r["loss"] - results[0]["loss"]) < 1e-6 for r in results)


def test_four_ranks_share_two_key_value_heads(tmp_path):
    directory = save_tiny(tmp_path / "model", "qwen3")
    input_ids, labels = batch()
    expected = reference(directory, input_ids, labels)
    sizes = {"tensor": 4, "sequence_parallel": True}
    results = run_ranks(loss_and_gradients, 4, directory, {"input_ids": input_ids, "labels": labels}, sizes)
    assert_equal_to_reference(results[0], expected)


def test_packed_sequences_equal_a_batch_at_tensor_parallel_2(tmp_path):
    directory = save_tiny(tmp_path / "model", "llama")
    input_ids, labels = batch()
    expected = reference(directory, input_ids, labels)
    inputs = {
        "input_ids": input_ids.flatten(),
        "labels": labels.flatten(),
        "cu_seqlens": torch.arange(0, 49, 12, dtype=torch.int32),
    }
    for sequence_parallel in (False, True):
        sizes = {"tensor": 2, "sequence_parallel": sequence_parallel}
        result = run_ranks(loss_and_gradients, 2, directory, inputs, sizes)[0]
        result["logits"] = result["logits"].view(4, 12, -1)
        assert_equal_to_reference(result, expected)


def test_smollm2_at_tensor_parallel_3_with_sequence_parallel(smollm2):
    input_ids, labels = batch(vocab=49152, rows=2, length=12)
    expected = reference(smollm2, input_ids, labels)
    sizes = {"tensor": 3, "sequence_parallel": True}
    results = run_ranks(loss_and_gradients, 3, smollm2, {"input_ids": input_ids, "labels": labels}, sizes, timeout=240)
    assert_equal_to_reference(results[0], expected)


STEPS = 100
OPTIMIZER = {"lr": 3e-3, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    """A hundred steps of transformers' model with torch's AdamW and clip_grad_norm_, in one process."""
    directory = save_tiny(tmp_path_factory.mktemp("curve") / "model", "qwen3", tie_word_embeddings=True)
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(STEPS):
        start = torch.randint(0, VOCAB, (4, 1), generator=generator)
        input_ids = (start + 7 * torch.arange(12)) % VOCAB  # a rule that can be learnt
        batches.append((input_ids, (input_ids + 7) % VOCAB))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    import polyshard as ps

    optimizer = ps.AdamW(**OPTIMIZER)(model.named_parameters())
    losses, norms = [], []
    for input_ids, labels in batches:
        loss = F.cross_entropy(model(input_ids).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], "the reference itself does not learn"
    return directory, batches, losses, norms, {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("ranks", "sizes", "engine"),
    [
        (1, {}, {}),
        (2, {"tensor": 2}, {}),
        (2, {"tensor": 2, "sequence_parallel": True}, {}),
        (2, {}, {"data_parallel": "ddp"}),
        (2, {}, {"data_parallel": "fsdp"}),
        (4, {"tensor": 2}, {"data_parallel": "fsdp"}),
        (4, {"tensor": 4}, {}),
    ],
    ids=["1", "tp2", "tp2-sp", "ddp2", "fsdp2", "tp2-fsdp2", "tp4-shared-kv"],
)
def test_training_follows_the_curve_of_transformers(curve, ranks, sizes, engine):
    """The same losses and gradient norms, clipping included. AdamW divides by the square root of a tiny second moment
    at first, which magnifies rounding; so curves are compared to 1e-3 relative over a hundred steps, and to 1e-5 over
    the first five."""
    directory, batches, losses, norms, _ = curve
    steps = STEPS if ranks <= 2 and engine.get("data_parallel") != "fsdp" else 20
    results = run_ranks(training_curve, ranks, directory, batches[:steps], sizes, engine, OPTIMIZER)
    for result in results:
        got = torch.tensor(result["losses"])
        want = torch.tensor(losses[:steps])
        assert ((got - want).abs() / want)[:5].max() < 1e-5
        assert ((got - want).abs() / want).max() < 1e-3
        assert torch.allclose(torch.tensor(result["norms"][:5]), torch.tensor(norms[:5]), rtol=1e-4)


def test_fsdp_shards_a_model_whose_key_value_heads_are_shared(curve):
    directory, batches, losses, norms, _ = curve
    results = run_ranks(
        training_curve,
        8,
        directory,
        batches[:4],
        {"tensor": 4},
        {"data_parallel": "fsdp"},
        OPTIMIZER,
        timeout=240,
    )
    assert torch.allclose(torch.tensor(results[0]["losses"]), torch.tensor(losses[:4]), rtol=1e-5)
    assert torch.allclose(torch.tensor(results[0]["norms"]), torch.tensor(norms[:4]), rtol=1e-4)
