"""A quantized checkpoint on a registered model; the oracles: vLLM's own model, and transformers on its values."""

import contextlib
import json
import shutil

import decoder
import pytest
import support.vllm_required  # noqa: F401
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.engines import engine, greedy
from support.models.tiny import save_tiny
from support.oracles.greedy import assert_same_generation, greedy_transformers
from support.oracles.quantized_files import save_four_bits, save_gpt_oss, save_other, save_quantized

import polyshard as ps
from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.served.loading import attach_loaders, load_weights
from polyshard.cli.serve import server_command
from polyshard.convert import convert
from polyshard.core.weight_table import collect_layouts

pytestmark = pytest.mark.vllm

PROMPTS, TOKENS = [[1, 2, 3, 4, 5], [7, 9, 11]], 6
AMX = torch.cpu._is_amx_tile_supported()
KIND, CLOSE = ("bfloat16", 0.1) if AMX else ("float32", 1e-4)  # vLLM's int8 kernel for AMX takes no float32
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
        with engine(codes, architecture, dtype=KIND) as llm:
            found.append(greedy(llm, PROMPTS, TOKENS))
    assert_same_generation(found[0], found[1], CLOSE)
    exact = greedy_transformers(values, PROMPTS, TOKENS)
    errors = [abs(a[1][0] - b[1][0]) for a, b in zip(found[0], exact)]
    assert 0 < max(errors) < 0.1  # activations are rounded to eight bits


def test_a_reload_is_refused(directories):
    """vLLM's own model takes the same codes again, and answers something else."""
    codes, _ = directories
    ps.register_model("ServedInt8", decoder.build_model)
    for architecture in ("ServedInt8", None):
        with engine(codes, architecture, dtype=KIND) as llm:
            before = greedy(llm, PROMPTS, TOKENS)
            refused = contextlib.nullcontext()
            if architecture is not None:
                refused = pytest.raises(ps.CheckpointError, match="a quantized checkpoint.*Restart the engine")
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


SHORT = {"max_model_len": 64, "dtype": "bfloat16"}


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_four_bits_give_what_their_values_give(tmp_path, method):
    save_four_bits(tmp_path / "codes", tmp_path / "values", method)
    ps.register_model("ServedFourBits", decoder.build_model)
    found = []
    for directory, architecture in ((tmp_path / "codes", "ServedFourBits"), (tmp_path / "values", None)):
        with engine(directory, architecture, **SHORT) as llm:
            found.append(greedy(llm, PROMPTS, TOKENS))
    assert_same_generation(found[0], found[1], 0.15 if AMX else 0.05)  # with AMX vLLM rounds activations to eight bits


def test_groups_out_of_order_and_biases_that_the_model_lacks_are_refused(tmp_path):
    """vLLM's own model leaves both out: g_idx where the configuration says desc_act=false, whatever they hold."""
    save_four_bits(tmp_path / "codes", tmp_path / "values", "gptq")
    changes = {"1.mlp.up_proj.g_idx": lambda value: value.flip(0), "1.mlp.up_proj.bias": torch.ones_like}
    edit_tensors(
        tmp_path / "codes",
        lambda name, value: changes.get(name.removeprefix("model.layers."), lambda same: same)(value),
    )
    ps.register_model("ServedFourBits", decoder.build_model)
    with (
        pytest.raises(Exception, match=r"unexpected (\S+.up_proj).bias; unexpected \1.g_idx$"),
        engine(tmp_path / "codes", "ServedFourBits", **SHORT),
    ):
        pass


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    changed = {name: change(name, value).contiguous() for name, value in tensors.items()}
    save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["float8 by channel", "fp8 in blocks"])
def test_a_scheme_without_a_kernel_is_refused_by_name_before_weights_are_loaded(tmp_path, kind):
    if kind.startswith("fp8") and AMX:
        pytest.skip("vLLM has a kernel for FP8 blocks on CPUs with AMX")
    save_quantized(tmp_path / "a", kind)
    ps.register_model("ServedFloat8", decoder.build_model)
    with (
        pytest.raises(Exception, match=r"of model.layers.0.self_attn.qkv is unsupported by vLLM .* convert --dtype"),
        engine(tmp_path / "a", "ServedFloat8", **SHORT),
    ):
        pass


@pytest.mark.skipif(not AMX, reason="vLLM serves FP8 in blocks on CPUs with AMX only")
def test_fp8_in_blocks_gives_what_its_values_give(tmp_path):
    """Its activations stay bfloat16."""
    whole_blocks = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_quantized(tmp_path / "codes", "fp8 in blocks", **whole_blocks, head_dim=64)
    convert(tmp_path / "codes", tmp_path / "values", dtype=torch.bfloat16)
    ps.register_model("ServedFloat8", decoder.build_model)
    with engine(tmp_path / "codes", "ServedFloat8", **SHORT) as llm:
        found = greedy(llm, PROMPTS, TOKENS)
    assert_same_generation(found, greedy_transformers(tmp_path / "values", PROMPTS, TOKENS), 0.1)


def without_experts(config, parallel_context):
    fields = {name: getattr(config, name) for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    return decoder.build_model(transformers.LlamaConfig(**fields, vocab_size=config.vocab_size), parallel_context)


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*arguments):
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr("polyshard.adapters.vllm.served.model.load_weights", load)


def test_experts_in_mxfp4_are_refused_by_name_before_weights_are_loaded(tmp_path, nothing_is_loaded):
    save_gpt_oss(tmp_path / "a")
    ps.register_model("ServedExperts", without_experts)
    expected = r"'ServedExperts' cannot be served: .*experts.down_proj_blocks in uint8.*convert --dtype bfloat16"
    with pytest.raises(Exception, match=expected), engine(tmp_path / "a", "ServedExperts", **SHORT):
        pass


def test_scales_of_the_kv_cache_are_refused_by_name_before_weights_are_loaded(directories, tmp_path, nothing_is_loaded):
    tensors = load_file(directories[0] / "model.safetensors")
    tensors["model.layers.1.self_attn.attn.k_scale"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((directories[0] / "config.json").read_text())
    ps.register_model("ServedInt8", decoder.build_model)
    expected = r"'ServedInt8' cannot be served: .*got model.layers.1.self_attn.attn.k_scale, 1 in all"
    with pytest.raises(Exception, match=expected), engine(tmp_path, "ServedInt8"):
        pass


def test_codes_of_another_scheme_are_refused_by_name_before_weights_are_loaded(tmp_path, nothing_is_loaded):
    save_other(tmp_path / "a", "packed")
    ps.register_model("ServedPacked", decoder.build_model)
    expected = r"'ServedPacked' cannot be served: .*layers.0.self_attn.q_proj.weight_packed in int32"
    with pytest.raises(Exception, match=expected), engine(tmp_path / "a", "ServedPacked", **SHORT):
        pass


def test_scales_of_another_shape_are_named(directories, tmp_path):
    shutil.copytree(directories[0], tmp_path / "a")
    name = "model.layers.1.self_attn.k_proj.weight_scale"
    edit_tensors(tmp_path / "a", lambda found, value: value[:8] if found == name else value)
    ps.register_model("ServedInt8", decoder.build_model)
    expected = rf"does not fit model 'ServedInt8': {name} is \[8, 1\], which this scheme does not take"
    with pytest.raises(Exception, match=expected), engine(tmp_path / "a", "ServedInt8"):
        pass


@pytest.mark.parametrize("method", ["mxfp4", "bitsandbytes"])
def test_a_method_that_cannot_be_served_is_refused_before_vllm_starts(tmp_path, method):
    if method == "mxfp4":
        save_gpt_oss(tmp_path / "a")
    else:
        save_other(tmp_path / "a", method)
    with pytest.raises(ps.CheckpointError, match=f"cannot be served: got .*quant_method='{method}'.*polyshard convert"):
        server_command(tmp_path / "a", "decoder:build_model", False, [])


def silent(directory, kind):
    """Codes and no word of them in the configuration, nor scales."""
    save_quantized(directory, kind)
    fields = json.loads((directory / "config.json").read_text())
    del fields["quantization_config"]
    (directory / "config.json").write_text(json.dumps(fields))
    tensors = load_file(directory / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "scale" not in name}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("kind", ["fp8 in blocks", "int8 by channel"])
def test_codes_that_the_configuration_does_not_state_are_refused_by_name(tmp_path, kind):
    directory = silent(tmp_path / "a", kind)
    ps.register_model("ServedCodes", decoder.build_model)
    expected = r"down_proj.weight in (float8_e4m3fn|int8)"
    with (
        pytest.raises(Exception, match=f"'ServedCodes' cannot be served: .*{expected}"),
        engine(directory, "ServedCodes", **SHORT),
    ):
        pass
    with pytest.raises(ps.CheckpointError, match=expected):
        server_command(directory, "decoder:build_model", False, [])


def test_a_code_is_no_weight_however_it_comes(tmp_path):
    """As from the Hub, from pickles, or in a reload: each tensor is looked at when it comes."""
    model = save_quantized(tmp_path / "a", "int8 by channel")
    context = ps.initialize("torch")
    served = decoder.build_model(model.config, context)
    table = collect_layouts(served)
    attach_loaders(served, table, context)
    stored = load_file(tmp_path / "a" / "model.safetensors").items()
    weights = [(name, value) for name, value in stored if not name.endswith("_scale")]
    with pytest.raises(ps.CheckpointError, match=r"down_proj.weight is int8: quantized codes"):
        load_weights(served, table, weights, "Served", lambda name: name, frozenset())
    ps.shutdown(context)
