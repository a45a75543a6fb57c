"""States of Megatron's and DeepSpeed's pipelines: bit for bit at the same sizes, and read by every other."""

import pytest
import torch
from support.models.tiny import save_tiny
from support.workers.library_pipelines import LibraryCase, in_bfloat16
from support.workers.pipeline_states import read, save_and_go_on
from support.workers.pipelines import Case

import polyshard as ps
from polyshard.testing import run_ranks

CASTS = {"precision": ps.Precision(compute=torch.bfloat16)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states") / "model"
    return str(save_tiny(folder, "llama", tie_word_embeddings=True, num_hidden_layers=4))


@pytest.fixture(scope="module")
def cases(directory):
    return {
        "megatron": LibraryCase.of("megatron", "shards", directory, "interleaved-1f1b"),
        "deepspeed": LibraryCase.of("deepspeed", "zero 1", directory),
        "casts": LibraryCase.of("deepspeed", "casts", directory, options={**CASTS, "zero_stage": 0}),
    }


@pytest.fixture(scope="module")
def saved(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(save_and_go_on, 2, list(cases.values()), folder)


def judge(case, results):
    for result in (result[case.name] for result in results):
        assert result["resumed"] == result["losses"], case.name
        assert all(torch.equal(result["again"][name], value) for name, value in result["weights"].items())
        assert result["carried"] == ["optimizer", "random", "weights"]
    first, last = (result[case.name]["weights"]["model.embed_tokens.weight"] for result in results)
    assert torch.equal(first, last), f"{case.name}: copies of the embedding differ"


def test_a_run_goes_on_bit_for_bit_at_the_same_sizes(saved, cases):
    for case in cases.values():
        judge(case, saved[1])


def test_other_libraries_and_sizes_read_the_states(saved, cases, directory):
    folder, results = saved
    alone = LibraryCase.of("megatron", "two replicas", directory, sizes={})
    pairs = [
        (cases["deepspeed"], cases["megatron"].name),
        (alone, cases["deepspeed"].name),
        (Case("torch", directory), cases["megatron"].name),
    ]
    for found in run_ranks(read, 2, pairs, folder):
        for (reader, source), losses in found.items():
            assert losses == pytest.approx(results[0][source]["losses"][2:], rel=1e-5), (reader, source)


def test_bfloat16_parameters_have_masters_in_stages(directory, tmp_path):
    staged = [
        LibraryCase.of("megatron", "bfloat16", directory, "interleaved-1f1b"),
        LibraryCase.of("deepspeed", "bfloat16", directory),
    ]
    results = run_ranks(in_bfloat16, 2, save_and_go_on, staged, tmp_path)
    whole = [LibraryCase.of(case.adapter, "bfloat16", directory, sizes={}) for case in staged]
    expected = run_ranks(in_bfloat16, 1, save_and_go_on, whole, tmp_path / "one")
    for case in staged:
        judge(case, results)
        assert results[0][case.name]["losses"] == pytest.approx(expected[0][case.name]["losses"], rel=1e-3), case.name
