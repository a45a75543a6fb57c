"""A checkpoint with an expert too few or too many is named, and nothing is loaded."""

import moe
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models.experts import save_moe

import polyshard as ps

EXPERT = "model.layers.1.mlp.experts.{}.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(EXPERT.format(7)), r"missing \(1\): model.layers.1.mlp.experts.7.up_proj"),
        (
            lambda tensors: tensors.update({EXPERT.format(8): tensors[EXPERT.format(7)].clone()}),
            r"unexpected \(1\): model.layers.1.mlp.experts.8.up_proj",
        ),
        (
            lambda tensors: tensors.update({EXPERT.format(7): torch.zeros(32, 63)}),
            r"wrong shape \(1\): model.layers.1.mlp.experts.7.up_proj.weight: got \[32, 63\], expected \[32, 64\]",
        ),
    ],
)
def test_damaged_experts_are_named(tmp_path, change, message):
    directory = save_moe(tmp_path / "model", "qwen3_moe")
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    context = ps.initialize("torch")
    model = moe.build_model(ps.read_config(directory), context)
    before = model.model.layers[0].mlp.experts.gate_up.clone()
    with pytest.raises(ps.CheckpointError, match=message):
        ps.load_checkpoint(model, directory, context)
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up, before)
