"""decoder.py on the layers of every library, against transformers; their engines are judged in test_conformance.py."""

import pytest
import torch
from support.models.tiny import save_tiny
from support.oracles.transformers_reference import MODELS, assert_equal_to_reference, batch, reference
from support.workers.on_ranks import loss_and_gradients

import polyshard as ps
from polyshard.testing import run_ranks

LIBRARIES = [name for name in ps.adapter_names() if name not in ("torch", "vllm")]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("model", ["llama-tied-biased", "qwen2"])
def test_logits_loss_and_every_gradient_equal_transformers(tmp_path, library, model):
    kind, changes = MODELS[model]
    directory = save_tiny(tmp_path / "model", kind, **changes)
    input_ids, labels = batch()
    expected = reference(directory, input_ids, labels)
    sizes = {"adapter": library, "tensor": 2}
    results = run_ranks(loss_and_gradients, 2, directory, {"input_ids": input_ids, "labels": labels}, sizes)
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
