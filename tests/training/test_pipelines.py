"""A pipeline trains to the weights of one process, on every schedule and beside every other axis."""

import pytest
from support.models.tiny import save_tiny
from support.oracles.pipeline_training import judge
from support.workers.pipelines import Case, train

from polyshard.testing import run_ranks

SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b", "zero-bubble-v", "dualpipe-v")
SPLIT = ("interleaved-1f1b", "zero-bubble-v")  # several stages per rank; the second one splits the backward pass
FSDP = {"data_parallel": "fsdp"}
FAIRSCALE = {"adapter": "fairscale", "layers": "fairscale"}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "tied"
    return str(save_tiny(folder, "llama", tie_word_embeddings=True, num_hidden_layers=4))


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("pipelines") / "untied", "qwen3", num_hidden_layers=4))


def test_two_ranks(tied, untied):
    cases = [
        *(Case(f"{name}, tied", tied, {"schedule": name}) for name in SCHEDULES),
        *(Case(f"{name}, untied", untied, {"schedule": name}) for name in ("1f1b", *SPLIT)),
        Case("the factory's own stage", tied, built=False, kind="steps of unequal lengths"),
        Case("uneven stages, clipped", tied, {"layers": (1, 3)}, options={"max_grad_norm": 0.5}),
        Case("packed", tied, {"schedule": "zero-bubble-v"}, kind="packed"),
        *(Case(f"uneven lengths, {name}", tied, {"schedule": name}, kind="uneven") for name in ("1f1b", *SPLIT)),
        Case("ragged rows", tied, kind="ragged rows"),
        Case("recompute", tied, {"schedule": "zero-bubble-v"}, options={"recompute": "full"}),
        *(Case(f"layers of {name}", tied, layers=name) for name in ("megatron", "deepspeed")),
    ]
    judge(cases, run_ranks(train, 2, cases, timeout=300))


def test_each_pair_of_axes(tied, untied):
    both = {"pipeline": 2, "tensor": 2}
    cases = [
        Case("four stages", tied, sizes={"pipeline": 4}),
        *(Case(f"data, {name}", tied, {"schedule": name}) for name in ("gpipe", "1f1b", *SPLIT, "dualpipe-v")),
        *(Case(f"fsdp, {name}", untied, {"schedule": name}, options=FSDP) for name in ("1f1b", *SPLIT)),
        Case("fsdp, tied", tied, options=FSDP),
        *(
            Case(f"OSS, {n}", tied, {"schedule": n}, adapter="fairscale", layers="fairscale")
            for n in ("1f1b", SPLIT[1])
        ),
        *(Case(f"tensor, {name}", tied, {"schedule": name}, sizes=both) for name in ("1f1b", "zero-bubble-v")),
        Case("sequence", tied, sizes={**both, "sequence_parallel": True}),
        Case("sequence, ragged rows", tied, sizes={**both, "sequence_parallel": True}, kind="ragged rows"),
        Case("context", tied, sizes={"pipeline": 2, "context": 2}),
        Case("context, zero bubble", tied, {"schedule": "zero-bubble-v"}, sizes={"pipeline": 2, "context": 2}),
    ]
    judge(cases, run_ranks(train, 4, cases, timeout=300))


def test_three_axes(tied):
    cases = [
        Case("tensor, context", tied, sizes={"pipeline": 2, "tensor": 2, "context": 2}),
        Case("data, tensor", tied, {"schedule": "zero-bubble-v"}, sizes={"pipeline": 2, "tensor": 2}),
        Case("data, context", tied, {"schedule": "interleaved-1f1b"}, sizes={"pipeline": 2, "context": 2}),
    ]
    judge(cases, run_ranks(train, 8, cases, timeout=300))
