"""A pipeline that is wrong says so on every rank, and a rank that fails is named on the others."""

from itertools import pairwise

import pytest
import torch
from support.models.tiny import save_tiny
from support.workers.pipeline_errors import fails, messages, skips_together

import polyshard as ps
from polyshard.testing import run_ranks

TIMEOUT = 8.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "model"
    return str(save_tiny(folder, "llama", tie_word_embeddings=True, num_hidden_layers=4))


def test_mistakes_are_told_on_every_rank(directory):
    told = {
        "missing": "Layers are missing: the pipeline stages have 3 of 4 in layers",
        "hole": "No pipeline stage has layers.1",
        "doubled": "The weight layers.2.weight is in pipeline stages 0, 1",
        "full": "The factory built the full model in each of 2 pipeline stages",
        "norm": "pass shared=('norm.weight',)",
        "shared": None,
        "raises": "no such layer",
        "plan of three ranks": "got a plan for 3 pipeline ranks, expected 2",
        "plan of five layers": "got a plan of 5 layers, expected 4",
        "full, without build_stages": "The factory built the full model",
        "forward": "Use engine.train_batch",
        "backward": "Use engine.train_batch",
        "accumulate": "Use engine.train_batch",
        "empty": "micro_batches is empty",
        "other data": "the ranks of a pipeline have different micro-batches",
        "fewer micro-batches": "the ranks of a pipeline have different micro-batches",
        "no input_ids": "no input_ids: got x, labels",
        "unknown argument": "unexpected keyword argument 'colour'",
        "rows and packed tokens": "have different dimensions",
        "cannot be padded": "mask cannot be padded: got shape (3,), expected",
        "nothing to train": "ranks [1] of a pipeline have nothing to train",
        "interleaved, five micro-batches": "interleaved-1f1b does not take 5 micro-batches",
        "recompute": "recompute='selective' is unsupported with zero-bubble-v",
        "unknown": "data_parallel must be 'ddp' or 'fsdp'",
    }
    of_one_rank = {
        "labels of one rank": "ConfigurationError: labels are no tensor: got list",
        "count of one rank": "KeyError: 'mask'",
        "label outside": "ValueError: label 131 is outside the vocabulary: expected 0 to 130",
        "label of one replica": "ValueError: label 131 is outside the vocabulary",
        "tuple of one replica": "ConfigurationError: micro-batch 0 is no mapping: got tuple",
    }
    for rank, found in enumerate(run_ranks(messages, 2, directory)):
        for name, text in of_one_rank.items():  # told at once, and the engine goes on
            there = f"RankFailureError: the step was not begun: rank 1 raised {text}"
            assert found.pop(name).startswith(text if rank == 1 else there), name
        assert found.pop("calls of the loss") == (4 if rank == 1 else 0), "only real micro-batches reach the loss"
        assert found.keys() == told.keys()
        for name, text in told.items():
            if text is None:
                assert found[name] is None
            else:
                assert text in found[name], name


def test_all_stages_skip_a_step_together(directory):
    for skipped, changed, updates, norms, all_reduces in run_ranks(skips_together, 2, directory):
        assert skipped == [False, True, False]
        assert changed == [False, True]
        assert updates == 2 + 2
        # Tied copies of the first train_batch must not be summed again by the second.
        assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)
        assert all_reduces == [3, 5], "a check of the data and a loss for each train_batch, and the norm"


@pytest.mark.parametrize(
    ("how", "word"), [("dies", "crashed"), ("freezes", "crashed, hung, or cannot be reached"), ("raises", "ValueError")]
)
def test_a_failing_stage_is_named_on_every_other_rank(directory, how, word):
    silent = () if how == "raises" else (1,)
    results = run_ranks(fails, 3, directory, how, 1, TIMEOUT, silent=silent, timeout=90)
    for rank in (0, 2):
        seconds, kind, message, ranks = results[rank]
        assert kind == "RankFailureError", message
        assert seconds < TIMEOUT
        assert 1 in ranks
        assert word in message
    if how == "raises":
        assert results[1][1:3] == ("ValueError", "the tokens are wrong")
        assert "ended in the middle of its schedule (ValueError: the tokens are wrong)" in results[1][4]


def test_plans_divide_layers_by_number_list_and_cost():
    assert ps.pipeline_plan(10, 4).bounds == (0, 3, 6, 8, 10)
    assert ps.pipeline_plan(4, 2, layers=(1, 3)).bounds == (0, 1, 4)
    assert ps.pipeline_plan(6, 2, schedule="interleaved-1f1b", stages_per_rank=3).placement == (0, 1, 0, 1, 0, 1)
    assert ps.pipeline_plan(6, 3, schedule="dualpipe-v").placement == (0, 1, 2, 2, 1, 0)
    assert ps.pipeline_plan(6, 1, schedule="dualpipe-v").placement == (0,)
    costs = torch.rand(12, generator=torch.Generator().manual_seed(0)).tolist()
    plan = ps.pipeline_plan(12, 4, costs=costs, ends=(0.5, 1.0))

    def largest(bounds):
        sums = [sum(costs[a:b]) for a, b in pairwise(bounds)]
        return max(sums[0] + 0.5, *sums[1:-1], sums[-1] + 1.0)

    every = [(0, a, b, c, 12) for a in range(1, 10) for b in range(a + 1, 11) for c in range(b + 1, 12)]
    assert largest(plan.bounds) == pytest.approx(min(map(largest, every)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"schedule": "pipedream"}, "schedule is unknown"),
        ({"schedule": "1f1b", "stages_per_rank": 2}, "expected 1"),
        ({"schedule": "zero-bubble-v", "stages_per_rank": 3}, "expected 2"),
        ({"schedule": "interleaved-1f1b", "stages_per_rank": 3}, "fewer layers than stages"),
        ({"layers": (1, 2)}, "the sum 4"),
        ({"layers": (4, 0)}, "each stage has a layer"),
        ({"costs": (1.0, 2.0)}, "got 2 numbers, expected 4"),
        ({"costs": (1.0, 2.0, 3.0, float("nan"))}, "finite"),
        ({"layers": (2, 2), "costs": (1.0,) * 4}, "Pass one of them"),
        ({"layers": (2.0, 2.0)}, r"layers of the stages are invalid: got \(2.0, 2.0\)"),
        ({"layers": 2}, "layers of the stages are invalid: got 2, expected a sequence"),
        ({"costs": [1] * 4, "ends": 3}, "ends are invalid: got 3"),
        ({"ends": (1, 3)}, r"ends has no effect: got \(1, 3\) without costs"),
    ],
)
def test_plans_that_cannot_be_are_refused(settings, told):
    with pytest.raises(ps.PolyshardError, match=told):
        ps.pipeline_plan(4, 2, **settings)


@pytest.mark.parametrize("arguments", [(4.0, 2), ("4", 2), (4, "2"), (4, True)])
def test_numbers_of_a_plan_are_integers(arguments):
    with pytest.raises(ps.LayoutError, match="is invalid: got .*, expected a positive integer"):
        ps.pipeline_plan(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.nn.Linear(2, 2), [{}]), "got Linear and list"),
        (({}, torch.nn.Linear(2, 2)), "got dict and Linear"),
        ((torch.nn.Linear(2, 2), {"input": torch.ones(2)}), "a micro-batch has no labels: got input"),
    ],
)
def test_layers_are_measured_of_a_module_on_a_micro_batch(arguments, message):
    with pytest.raises(ps.ConfigurationError, match=message):
        ps.measure_layers(*arguments, ps.initialize("torch"))
