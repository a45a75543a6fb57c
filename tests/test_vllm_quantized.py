"""A quantized checkpoint on a registered model; the oracles: vLLM's own model, and transformers on its values."""

import contextlib
import json

import decoder
import pytest
import support.vllm_required  # noqa: F401
import torch
from safetensors.torch import load_file, save_file
from support.engines import engine, greedy
from support.models import save_tiny
from support.oracle import assert_same_generation, greedy_transformers

import polyshard as ps
from polyshard.adapters.vllm import compat

pytestmark = pytest.mark.vllm

PROMPTS, TOKENS = [[1, 2, 3, 4, 5], [7, 9, 11]], 6
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "model.layers.0.mlp.down_proj"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
        }
    },
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A checkpoint of int8 codes with a scale for each row, and one of the values that they stand for."""
    folder = tmp_path_factory.mktemp("quantized")
    plain = save_tiny(folder / "plain", "llama", hidden_size=96, head_dim=32, attention_bias=True)
    codes, values = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        values[name] = codes[name] = weight
        layer = name.removesuffix(".weight")
        if weight.dim() == 2 and "_proj" in name and layer not in SCHEME["ignore"]:
            scale = weight.abs().amax(1, keepdim=True) / 127
            codes[name] = (weight / scale).round().to(torch.int8)
            codes[f"{layer}.weight_scale"] = scale
            values[name] = codes[name].float() * scale
    for kind, tensors, extra in (("codes", codes, {"quantization_config": SCHEME}), ("values", values, {})):
        (folder / kind).mkdir()
        save_file(tensors, folder / kind / "model.safetensors", metadata={"format": "pt"})
        fields = json.loads((plain / "config.json").read_text())
        (folder / kind / "config.json").write_text(json.dumps({**fields, **extra}))
    return folder / "codes", folder / "values"


def test_int8_gives_what_vllms_own_model_gives(directories):
    codes, values = directories
    ps.register_model("ServedInt8", decoder.build_model)
    found = []
    for architecture in ("ServedInt8", None):
        with engine(codes, architecture) as llm:
            found.append(greedy(llm, PROMPTS, TOKENS))
    assert_same_generation(found[0], found[1], 1e-4)
    exact = greedy_transformers(values, PROMPTS, TOKENS)
    errors = [abs(a[1][0] - b[1][0]) for a, b in zip(found[0], exact)]
    assert 0 < max(errors) < 0.1  # activations are rounded to eight bits


def test_a_reload_is_refused(directories):
    """vLLM's own model takes the same codes again, and answers something else."""
    codes, _ = directories
    ps.register_model("ServedInt8", decoder.build_model)
    for architecture in ("ServedInt8", None):
        with engine(codes, architecture) as llm:
            before = greedy(llm, PROMPTS, TOKENS)
            refused = contextlib.nullcontext()
            if architecture is not None:
                refused = pytest.raises(ps.CheckpointError, match="a quantized checkpoint.*start the engine anew")
            with refused:
                llm.collective_rpc("reload_weights", kwargs={"weights_path": str(codes)})
            llm.reset_prefix_cache()
            if architecture is None:
                assert greedy(llm, PROMPTS, TOKENS) != before, "vLLM has mended it: registered models may reload too"
            else:
                model = compat.local_worker(llm).model
                with pytest.raises(ps.WeightSyncError, match="a reload of its weights has begun"):
                    model(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def test_a_scale_that_lacks_and_a_tensor_too_many_are_named(directories, tmp_path):
    codes, _ = directories
    tensors = load_file(codes / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight_scale"]
    tensors["model.layers.1.self_attn.k_proj.azp"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((codes / "config.json").read_text())
    ps.register_model("ServedInt8", decoder.build_model)
    with pytest.raises(Exception, match=r"does not fit") as caught, engine(tmp_path, "ServedInt8"):
        pass
    assert "missing model.layers.1.self_attn.k_proj.weight_scale" in str(caught.value)
    assert "unexpected model.layers.1.self_attn.k_proj.azp" in str(caught.value)


def test_another_librarys_layers_are_refused(directories):
    ps.register_model("ServedInt8Torch", decoder.build_model, adapter="torch")
    with (
        pytest.raises(Exception, match=r"a quantized checkpoint needs vLLM's own layers.*adapter='torch'"),
        engine(directories[0], "ServedInt8Torch"),
    ):
        pass
