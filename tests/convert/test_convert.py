"""Checkpoints that other programs wrote, into Hugging Face directories and back.

Every input is made by its library's own save code; the oracle is the library's own loss against transformers'.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models.tiny import save_tiny, tiny_model
from support.oracles.library_checkpoints import (
    config,
    llama,
    load_megatron,
    save_dcp,
    save_deepspeed,
    save_megatron,
    transformers_loss,
)
from typer.testing import CliRunner

import polyshard as ps
from polyshard.checkpoint import stream
from polyshard.cli.app import app
from polyshard.convert import convert
from polyshard.convert.format import Options
from polyshard.testing import run_ranks

ALLOWED = Options(config=config().to_dict(), allow_pickle=True)
CLOSE = 2e-6  # of a loss near 5: float32 rounding


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A Hugging Face directory, and its tensors."""
    directory = tmp_path_factory.mktemp("convert") / "original"
    tiny_model(config()).save_pretrained(directory)
    return directory


def assert_same_tensors(directory, want):
    found = load_file(directory / "model.safetensors")
    assert set(found) == set(want)
    assert all(torch.equal(found[name], want[name].float()) for name in want)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["torch_dist", "legacy"])
def test_megatron_to_hugging_face(tmp_path, kind, size):
    loss = run_ranks(save_megatron, size, tmp_path / "megatron", size, kind)[0]
    done = convert(tmp_path / "megatron", tmp_path / "hf", options=ALLOWED, verify=True)
    assert done.source == {"torch_dist": "megatron-torch-dist", "legacy": "megatron-legacy"}[kind]
    assert done.verified == 21
    assert ("Megatron-Core's GPTModel" in done.compared[-1]) == (kind == "torch_dist" or size == 1), done.not_compared
    assert abs(transformers_loss(tmp_path / "hf") - loss) < CLOSE


@pytest.mark.parametrize("size", [1, 2])
def test_hugging_face_to_megatron(original, tmp_path, size):
    """Megatron's own loading reads it, at either size."""
    done = convert(original, tmp_path / "megatron", to_format="megatron-torch-dist", verify=True)
    assert done.verified == 21
    loss = run_ranks(load_megatron, size, tmp_path / "megatron", size)[0]
    assert abs(transformers_loss(original) - loss) < CLOSE


@pytest.mark.parametrize("embedding", ["llama2", "llama3"])
@pytest.mark.parametrize("size", [1, 2])
def test_llama_to_hugging_face(tmp_path, size, embedding):
    (tmp_path / "llama").mkdir()
    loss = run_ranks(llama, size, tmp_path / "llama", size, embedding, True)[0]
    done = convert(tmp_path / "llama", tmp_path / "hf", options=Options(allow_pickle=True), verify=True)
    assert done.found == f"Llama's own format, model-parallel size {size} (consolidated.00.pth and on)"
    assert abs(transformers_loss(tmp_path / "hf") - loss) < CLOSE


@pytest.mark.parametrize("size", [1, 2])
def test_hugging_face_to_llama(original, tmp_path, size):
    done = convert(original, tmp_path / "llama", to_format="llama", options=Options(tensor_parallel=size), verify=True)
    assert done.verified == 21
    loss = run_ranks(llama, size, tmp_path / "llama", size, "llama3", False)[0]
    assert abs(transformers_loss(original) - loss) < CLOSE


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_deepspeed_to_hugging_face(tmp_path, stage):
    want = run_ranks(save_deepspeed, 2, tmp_path / "deepspeed", stage)[0]
    done = convert(tmp_path / "deepspeed", tmp_path / "hf", options=ALLOWED)
    assert "tag step1" in done.found
    assert_same_tensors(tmp_path / "hf", want)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_with_frozen_parameters_to_hugging_face(tmp_path, stage):
    """zero_to_fp32 does not find them in checkpoints of ZeRO 1."""
    want = run_ranks(save_deepspeed, 2, tmp_path / "deepspeed", stage, 1, True)[0]
    convert(tmp_path / "deepspeed", tmp_path / "hf", options=ALLOWED, verify=True)
    assert_same_tensors(tmp_path / "hf", want)


def test_deepspeed_universal_to_hugging_face(tmp_path):
    want = run_ranks(save_deepspeed, 2, tmp_path / "deepspeed", 1)[0]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder"]
    command += [str(tmp_path / "deepspeed" / "step1"), "--output_folder", str(tmp_path / "universal")]
    done = subprocess.run([*command, "--num_extract_workers", "1", "--num_merge_workers", "1"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    result = convert(tmp_path / "universal", tmp_path / "hf", options=ALLOWED)
    assert result.source == "deepspeed-universal"
    assert_same_tensors(tmp_path / "hf", want)


def test_deepspeed_with_tensor_parallel_to_hugging_face(original, tmp_path):
    run_ranks(save_deepspeed, 2, tmp_path / "deepspeed", 0, 2)
    done = convert(tmp_path / "deepspeed", tmp_path / "hf", options=ALLOWED)
    assert done.found.endswith("no ZeRO, tensor-parallel 2")
    assert_same_tensors(tmp_path / "hf", load_file(original / "model.safetensors"))


def test_torch_distributed_to_hugging_face(original, tmp_path):
    run_ranks(save_dcp, 2, tmp_path / "dcp")
    done = convert(tmp_path / "dcp", tmp_path / "hf", options=ALLOWED)
    assert done.found == "torch's distributed checkpoint in 2 files"
    assert_same_tensors(tmp_path / "hf", load_file(original / "model.safetensors"))


def test_pickles_need_the_users_leave_and_run_nothing(original, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(original / "config.json", old)
    torch.save(load_file(original / "model.safetensors"), old / "pytorch_model.bin")
    with pytest.raises(ps.CheckpointError, match=r"pytorch_model.bin is a pickle.*Pass --allow-pickle"):
        convert(old, tmp_path / "a")
    convert(old, tmp_path / "b", options=Options(allow_pickle=True))
    assert_same_tensors(tmp_path / "b", load_file(original / "model.safetensors"))
    torch.save({"x": print}, old / "pytorch_model.bin")
    with pytest.raises(ps.CheckpointError, match="cannot be read as tensors and plain data"):
        convert(old, tmp_path / "c", options=Options(allow_pickle=True))
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "c").exists()


def test_gguf_to_hugging_face(tmp_path, smollm2):
    """SmolLM2 as its package carries it; the cached directory was made from the same file."""
    from smollm2 import gguf_file

    done = convert(gguf_file(), tmp_path / "hf", dtype=torch.bfloat16)
    assert done.found.startswith("a GGUF file of ")
    found, want = (load_file(path / "model.safetensors") for path in (tmp_path / "hf", smollm2))
    assert set(found) == set(want)
    assert all(torch.equal(found[name], want[name]) for name in want)


def run_cli(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_the_command_line(original, tmp_path):
    done = run_cli(original, tmp_path / "half", "--dtype", "bfloat16", "--verify")
    assert done.exit_code == 0, done.output
    assert "found a Hugging Face directory, 1 safetensors files" in done.output
    assert "huggingface -> huggingface: 21 tensors" in done.output
    assert "verified: 21 fingerprints equal, logits equal" in done.output
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    done = run_cli(original, tmp_path / "llama", "--to", "llama", "--tensor-parallel", "2", "--verify")
    assert done.exit_code == 0
    assert sorted(p.name for p in (tmp_path / "llama").iterdir() if p.suffix != ".jinja") == [
        "config.json",
        "consolidated.00.pth",
        "consolidated.01.pth",
        "generation_config.json",
        "params.json",
    ]


REFUSED = {
    "nothing": (lambda d: d / "nowhere", {}, "does not exist"),
    "unknown": (lambda d: _made(d, "unknown", {"notes.txt": "x"}), {}, "has an unknown format: got"),
    "no such format": (lambda d: d, {"to_format": "pdf"}, "unknown format 'pdf', expected one of "),
    "not written": (lambda d: d, {"to_format": "deepspeed"}, "is read, not written: write huggingface"),
    "torn": (lambda d: _torn(d), {}, "truncated or not a safetensors file"),
    "foreign config": (
        lambda d: d,
        {"to_format": "llama", "options": Options(config={"a": 1})},
        "model_type is unsupported: got None",
    ),
    "indivisible": (
        lambda d: d,
        {"to_format": "llama", "options": Options(tensor_parallel=3)},
        "heads 4 cannot be divided by tensor-parallel size 3",
    ),
}


def _made(directory, name, files):
    made = directory.parent / name
    made.mkdir(exist_ok=True)
    for file, content in files.items():
        (made / file).write_text(content)
    return made


def _torn(directory):
    torn = directory.parent / "torn"
    shutil.copytree(directory, torn, dirs_exist_ok=True)
    file = torn / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return torn


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_said_and_nothing_is_left_behind(original, tmp_path, case):
    source, settings, message = REFUSED[case]
    with pytest.raises(ps.CheckpointError, match=message):
        convert(source(original), tmp_path / "out" / "target", **settings)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_missing_tensors_and_missing_configurations_are_named(original, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(original, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(
        ps.CheckpointError, match=r"1 of the model's 21 tensors are missing: model.layers.1.self_attn.k_proj.weight"
    ):
        convert(broken, tmp_path / "m", to_format="megatron-torch-dist")
    run_ranks(save_dcp, 2, tmp_path / "dcp")
    with pytest.raises(ps.CheckpointError, match="do not hold the model's configuration. Pass --config"):
        convert(tmp_path / "dcp", tmp_path / "x", options=Options(allow_pickle=True))
    other = Options(config=config().to_dict() | {"num_hidden_layers": 3}, allow_pickle=True)
    with pytest.raises(ps.CheckpointError, match=r"9 of the model's 30 tensors are missing: model.layers.2"):
        convert(tmp_path / "dcp", tmp_path / "x", options=other)


def test_a_target_that_is_there_is_not_touched(original, tmp_path):
    target = save_tiny(tmp_path / "there", "llama")
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(ps.CheckpointError, match="exists and is not empty. Name a new directory"):
        convert(original, target)
    assert (target / "model.safetensors").read_bytes() == before
    with pytest.raises(ps.CheckpointError, match=r"model.safetensors exists and is a file. Name a new directory"):
        convert(original, target / "model.safetensors")


def test_a_target_behind_a_symbolic_link_is_written_there(original, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "new")
    convert(original, link)
    assert link.is_symlink()
    assert (tmp_path / "disk" / "new" / "model.safetensors").is_file()


def test_a_target_that_cannot_be_created_is_named(original, tmp_path):
    file = original / "config.json"
    result = CliRunner().invoke(app, ["convert", str(original), str(file / "below")])
    assert result.exit_code == 1
    assert isinstance(result.exception, ps.CheckpointError)
    assert f"writing {file / 'below'} failed; nothing was changed" in str(result.exception)


def test_a_full_disk_is_told_with_the_targets_name(original, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", str(next(tmp_path.glob(".new.saving-*")) / "target" / "x"))

    monkeypatch.setattr(stream, "put", full)
    with pytest.raises(ps.CheckpointError, match=f"No space left on device: '{tmp_path / 'new' / 'x'}'"):
        convert(original, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_conversion_left_is_removed_by_the_next(original, tmp_path):
    killed = f"""
import os, signal
from polyshard.checkpoint import stream
from polyshard.convert import convert
stream.put = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
convert({str(original)!r}, {str(tmp_path / "new")!r})
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".new.saving-")
    convert(original, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
