"""What Megatron's and DeepSpeed's pipelines lack is refused with the reason, and a stage that fails is named."""

import pytest
from support.models.tiny import save_tiny
from support.workers.library_pipeline_errors import INTERLEAVED, fails, messages

from polyshard.testing import run_ranks

TIMEOUT = 8.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "model"
    return str(save_tiny(folder, "llama", tie_word_embeddings=True, num_hidden_layers=4))


def test_what_a_library_lacks_is_refused_with_the_reason(directory):
    told = {
        "megatron, V": "Megatron has no schedule zero-bubble-v: expected 1f1b or interleaved-1f1b",
        "megatron, gpipe": "Megatron has no schedule gpipe",
        "deepspeed, interleaved": "DeepSpeed has no schedule interleaved-1f1b: expected 1f1b",
        "deepspeed, zero 2": "DeepSpeed's pipelines have ZeRO stages 0 and 1: got zero_stage=2",
        "deepspeed, zero 3": "DeepSpeed's pipelines have ZeRO stages 0 and 1: got zero_stage=3",
        "deepspeed, offload": "offload='optimizer' is unsupported in DeepSpeed's pipelines",
        "deepspeed, partitions": "config sets the pipeline",
        "megatron, forward": "Use engine.train_batch",
        "megatron, backward": "Use engine.train_batch",
        "megatron, accumulate": "Use engine.train_batch",
        "megatron, 3 micro-batches": "interleaved-1f1b does not take 3 micro-batches on 2 pipeline ranks",
        "deepspeed, forward": "Use engine.train_batch",
        "deepspeed, backward": "Use engine.train_batch",
        "deepspeed, accumulate": "Use engine.train_batch",
        "deepspeed, 3 micro-batches": None,
    }
    for found in run_ranks(messages, 2, directory):
        for library in ("megatron", "deepspeed"):
            skipped, changed, norms, all_reduces = found.pop(f"{library}, training")
            assert skipped == [False, True, False], "all stages skip the step together"
            assert changed == [True, False, True]
            # Tied copies of the first train_batch must not be summed again by the second.
            assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)
            if library == "deepspeed":
                assert all_reduces == [3, 5], "a check of the data and a loss for each train_batch, and the norm"
        assert found.keys() == told.keys()
        for name, text in told.items():
            if text is None:
                assert found[name] is None
            else:
                assert text in (found[name] or ""), name


@pytest.mark.parametrize(
    ("library", "schedule", "how", "word"),
    [
        ("megatron", INTERLEAVED, "dies", "crashed"),
        ("torch", "1f1b", "has no gradient", "raised ConfigurationError: the loss does not depend on the model"),
        ("deepspeed", "1f1b", "has no gradient", "raised ConfigurationError: the loss does not depend on the model"),
    ],
)
def test_a_failing_stage_is_named_on_the_other_rank(directory, library, schedule, how, word):
    silent = (1,) if how == "dies" else ()
    results = run_ranks(fails, 2, library, schedule, directory, how, TIMEOUT, silent=silent, timeout=90)
    seconds, kind, message, ranks = results[0]
    assert kind == "RankFailureError", message
    assert seconds < TIMEOUT
    assert ranks == (1,)
    assert word in message
