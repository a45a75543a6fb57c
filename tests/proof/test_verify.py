"""`polyshard verify`: green for a right model, red for one that is not, and a status that says which."""

import functools
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import forked
from support.command_line import polyshard
from support.models.experts import save_moe
from support.models.tiny import save_tiny

import polyshard as ps
from polyshard.cli.verify_exact import longest_prompt, random_prompts
from polyshard.proof.parity import run_transformers

FACTORY = "decoder:build_model"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(
        tmp_path_factory.mktemp("verify") / "model", "qwen3", hidden_size=64, head_dim=32, tie_word_embeddings=True
    )


@pytest.fixture
def verify(capfd):
    return functools.partial(polyshard, capfd, "verify")


def test_every_library_is_equal_to_transformers(directory, verify):
    done = verify("--model", directory, "--factory", FACTORY, "--tensor-parallel", "1,2", "--json")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = json.loads(done.stdout)["rows"]
    assert {(row["adapter"], row["tensor_parallel"]) for row in rows} == {
        (name, size) for name in ("torch", "megatron", "deepspeed", "fairscale") for size in (1, 2)
    }
    for row in rows:
        assert max(row["loss"], row["logits"], row["gradients"]) < 1e-5


def test_without_a_model_the_built_in_one_is_judged_in_float64(verify):
    done = verify("--adapters", "torch,fairscale", "--tensor-parallel", "1,2", "--json")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 4
    assert all(row["gradients"] < 1e-5 for row in rows)


def test_a_pipeline_is_equal_to_transformers(directory, verify):
    options = ("--tensor-parallel", "1", "--pipeline-parallel", "2", "--json")
    done = verify("--model", directory, "--factory", FACTORY, *options)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = json.loads(done.stdout)["rows"]
    assert {(row["adapter"], row["pipeline_parallel"]) for row in rows} == {
        (name, 2) for name in ("torch", "megatron", "deepspeed", "fairscale")
    }
    assert all(max(row["loss"], row["logits"], row["gradients"]) < 1e-5 for row in rows)


@pytest.mark.vllm
def test_without_a_model_the_small_one_is_served_and_nothing_is_left_behind(tmp_path):
    """Sockets of the engine are removed. The tutorial's test runs `--vllm` with a model (test_tutorial.py)."""
    folder = Path(tempfile.mkdtemp(prefix="left-"))
    polyshard = Path(sys.executable).with_name("polyshard")
    options = ("--exact", "--json", "--adapters", "torch", "--tensor-parallel", "1")
    try:
        done = forked.run(polyshard, ("verify", *options), {**os.environ, "TMPDIR": str(folder)}, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        found = json.loads(done.stdout)
        assert found["holds"]
        assert all(row["tokens"] > 100 for row in found["comparisons"])
        assert [path.name for path in folder.iterdir()] == []
    finally:
        shutil.rmtree(folder)


def test_a_model_that_differs_is_red(directory, verify):
    options = ("--adapters", "torch", "--tensor-parallel", "1")
    done = verify("--model", directory, "--factory", "support.models.different_factory:build_model", *options)
    assert done.returncode == 1
    assert "equal" not in done.stdout


def test_a_size_that_does_not_divide_is_told_in_its_row(directory, verify):
    options = ("--adapters", "torch", "--tensor-parallel", "3", "--json")
    done = verify("--model", directory, "--factory", FACTORY, *options)
    assert done.returncode == 1
    (row,) = json.loads(done.stdout)["rows"]
    assert "cannot be divided by tensor-parallel size 3" in row["error"]


def test_bad_arguments(directory, verify):
    factory = ("--factory", FACTORY)
    done = verify("--model", directory, *factory, "--tensor-parallel", "two")
    assert "--tensor-parallel is invalid: got 'two', expected numbers separated by commas" in done.stderr
    assert "config.json does not exist" in verify("--model", directory / "nowhere", *factory).stderr
    assert "--model and --factory must be passed together" in verify(*factory).stderr
    assert "--tokens is invalid: got 1, expected 2 or more" in verify("--tokens", "1").stderr


def test_prompts_of_an_exact_comparison_fit_into_a_short_model(capsys):
    """vLLM would end in a traceback, since prompts and samples need 200 positions."""
    assert longest_prompt(4096, tokens=24, spare=16) > 160
    assert capsys.readouterr().err == ""
    assert longest_prompt(96, tokens=24, spare=16) == 56
    assert "prompts are cut to 56 tokens, from 160: the model has 96 positions" in capsys.readouterr().err
    assert sorted(map(len, random_prompts(9, 56))) == [1, 5, 17, 56, 56, 56, 56]
    with pytest.raises(ps.ConfigurationError, match="got max_position_embeddings 40 with --tokens 24, expected at le"):
        longest_prompt(40, tokens=24, spare=16)


def test_gradients_of_experts_have_the_names_of_a_checkpoint(tmp_path):
    """transformers holds the experts of a layer as one tensor, and stores them one by one."""
    directory = save_moe(tmp_path / "model", "qwen3_moe")
    found = run_transformers(directory, [1, 2, 3, 4])
    stored = load_file(directory / "model.safetensors")
    assert {name: value.shape for name, value in found.items() if name not in ("loss", "logits")} == {
        name: value.shape for name, value in stored.items()
    }
    assert float(found["model.layers.0.mlp.gate.weight"].abs().max()) > 0
