"""Pickled training checkpoints are read without importing or running what they name.

Sources: NVIDIA/Megatron-LM#1884 and huggingface/transformers#40500 (random states and enums after PyTorch 2.6).
"""

import argparse
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.models.tiny import tiny_config, tiny_model
from support.oracles.megatron_legacy import save_legacy, training_state

import polyshard as ps
from polyshard.convert.format import Options
from polyshard.convert.pickles import Inert, load_pickle

ALLOWED = Options(allow_pickle=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("llama"))


def test_a_training_checkpoint_of_megatron_converts_in_a_process_without_megatron(tmp_path, model):
    """By the command line, as a user would: the process must not import Megatron to read what Megatron pickled."""
    source = save_legacy(tmp_path / "meg", model, **training_state())
    model.config.save_pretrained(tmp_path / "config")
    code = (
        "import sys; from polyshard.cli import main\n"
        "try: main()\n"
        "finally: sys.exit(3) if any(m.split('.')[0] == 'megatron' for m in sys.modules) else None\n"
    )
    arguments = ["convert", source, tmp_path / "out", "--config", tmp_path / "config", "--allow-pickle"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "left out the training state" in done.stderr
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_not_imported_is_inert(tmp_path, zipped):
    torch.save(training_state(), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    content = load_pickle(tmp_path / "x.pt", ALLOWED)
    assert isinstance(content["args"], argparse.Namespace)
    assert content["args"].num_layers == 2
    assert isinstance(content["args"].attention_backend, Inert)
    assert "AttnBackend" in repr(content["args"].attention_backend)
    assert isinstance(content["rng_state"][0]["np_rng_state"][1], Inert)
    assert content["rng_state"][0]["random_rng_state"] == random.getstate()


class Hidden:
    """Runs a function of a package that stand-ins are made for."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (subprocess.check_call, (["touch", str(self.place)],))


NAMED = {
    "a function": (print, r"it names builtins\.print"),
    "a class of the user": (Hidden("x"), r"it names (subprocess|commands)\.check_call"),
    "a system call": (__import__("os").system, r"it names (posix|os)\.system"),
}


@pytest.mark.parametrize("case", NAMED)
@pytest.mark.parametrize("zipped", [True, False])
def test_other_types_are_refused_by_name_with_the_way_out(tmp_path, case, zipped):
    value, message = NAMED[case]
    torch.save({"model": {}, "x": value}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ps.CheckpointError, match=message + r".*Save only the weights, .*torch.save\(") as caught:
        load_pickle(tmp_path / "x.pt", ALLOWED)
    assert "x.pt" in str(caught.value)


def test_a_stand_in_runs_nothing(tmp_path):
    """Even of a package that is allowed: numpy's own functions are not called."""

    class Touches:
        def __reduce__(self):
            return (np.save, (str(tmp_path / "made.npy"), 1))

    torch.save({"model": {}, "x": Touches()}, tmp_path / "x.pt")
    assert isinstance(load_pickle(tmp_path / "x.pt", ALLOWED)["x"], Inert)
    assert not (tmp_path / "made.npy").exists()


def test_without_leave_nothing_is_read(tmp_path, model):
    source = save_legacy(tmp_path / "meg", model)
    from polyshard.convert import convert

    with pytest.raises(
        ps.CheckpointError, match="is a pickle, which can run code when it is read. Pass --allow-pickle"
    ):
        convert(source, tmp_path / "out", options=Options(config=model.config.to_dict()))


def test_a_torn_pickle_is_told(tmp_path):
    torch.save({"model": torch.ones(1000)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-500])
    with pytest.raises(ps.CheckpointError, match="cannot be read as tensors and plain data: .*Copy it again"):
        load_pickle(tmp_path / "x.pt", ALLOWED)


def test_an_index_that_names_a_function_is_refused(tmp_path):
    """`.metadata` is read by Python's pickle in torch itself."""
    import pickle

    from polyshard.convert import convert

    class Touches:
        def __reduce__(self):
            return (__import__("pathlib").Path.touch, (__import__("pathlib").Path(tmp_path / "made"),))

    model = tiny_model(tiny_config("llama"))
    place = tmp_path / "dcp"
    torch.distributed.checkpoint.save(model.state_dict(), checkpoint_id=place, no_dist=True)
    options = Options(config=model.config.to_dict(), allow_pickle=True)
    convert(place, tmp_path / "right", options=options)
    (place / ".metadata").write_bytes(pickle.dumps([Touches()]))
    with pytest.raises(ps.CheckpointError, match=r".metadata names .*which polyshard does not load"):
        convert(place, tmp_path / "out", options=options)
    assert not (tmp_path / "made").exists()
