"""decoder.py on the layers and training engines of every library, against transformers."""

import pytest
import torch
from support.models import save_tiny
from support.on_ranks import loss_and_gradients, training_curve
from test_torch_adapter import (
    MODELS,
    OPTIMIZER,
    assert_equal_to_reference,
    batch,
    curve,  # noqa: F401  # a fixture
    reference,
)

import polyshard as ps
from polyshard.testing import run_ranks

LIBRARIES = [name for name in ps.adapter_names() if name not in ("torch", "vllm")]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_logits_loss_and_every_gradient_equal_transformers(tmp_path, library, model, tensor):
    kind, changes = MODELS[model]
    directory = save_tiny(tmp_path / "model", kind, **changes)
    input_ids, labels = batch()
    expected = reference(directory, input_ids, labels)
    sizes = {"adapter": library, "tensor": tensor}
    results = run_ranks(loss_and_gradients, tensor, directory, {"input_ids": input_ids, "labels": labels}, sizes)
    assert_equal_to_reference(results[0], expected)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("packed", [False, True])
def test_sequence_parallel_equals_transformers_or_is_refused_with_the_reason(tmp_path, library, packed):
    sizes = {"adapter": library, "tensor": 2, "sequence_parallel": True}
    support = ps.load_adapter(library).capabilities["sequence"]
    if not support.available:
        with pytest.raises(AssertionError, match=support.reason[:20]):
            run_ranks(loss_and_gradients, 2, tmp_path, {}, sizes)
        return
    directory = save_tiny(tmp_path / "model", "qwen3", attention_bias=True, tie_word_embeddings=True)
    input_ids, labels = batch()
    expected = reference(directory, input_ids, labels)
    inputs = {"input_ids": input_ids, "labels": labels}
    if packed:
        boundaries = torch.arange(0, 49, 12, dtype=torch.int32)
        inputs = {"input_ids": input_ids.flatten(), "labels": labels.flatten(), "cu_seqlens": boundaries}
    result = run_ranks(loss_and_gradients, 2, directory, inputs, sizes)[0]
    result["logits"] = result["logits"].view(4, 12, -1)
    assert_equal_to_reference(result, expected)


ENGINES = {
    "fairscale": [{"zero_stage": 1}, {"zero_stage": 2}],
    "deepspeed": [{"zero_stage": stage} for stage in (0, 1, 2, 3)],
    "megatron": [{"zero_stage": 0}, {"zero_stage": 1}],
}


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (2, 2), (2, 1), (4, 2)], ids=["1", "tp2", "dp2", "tp2-dp2"])
@pytest.mark.parametrize(
    ("library", "engine"), [(name, engine) for name in LIBRARIES for engine in ENGINES[name]], ids=str
)
def test_training_follows_the_curve_of_transformers(curve, library, engine, ranks, tensor):  # noqa: F811
    """Twenty steps: the same losses and gradient norms, clipping included; bounds as in test_torch_adapter.py."""
    directory, batches, losses, norms, _ = curve
    sizes = {"adapter": library, "tensor": tensor}
    for result in run_ranks(training_curve, ranks, directory, batches[:20], sizes, engine, OPTIMIZER):
        got, want = torch.tensor(result["losses"]), torch.tensor(losses[:20])
        assert ((got - want).abs() / want)[:5].max() < 1e-5
        assert ((got - want).abs() / want).max() < 1e-3
        assert torch.allclose(torch.tensor(result["norms"][:5]), torch.tensor(norms[:5]), rtol=1e-4)
