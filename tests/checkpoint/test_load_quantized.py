"""Loading quantized directories: dequantized as transformers does at every tensor-parallel size, or refused by name."""

import contextlib
import json

import decoder
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models.tiny import save_tiny, tiny_config
from support.oracles.quantized_files import (
    KINDS,
    OTHERS,
    SHAPE,
    dequantized_by_transformers,
    gpt_oss_by_transformers,
    save_fp8_by_transformers,
    save_gpt_oss,
    save_other,
    save_quantized,
)

import polyshard as ps
from polyshard.checkpoint.storage import BUCKET_BYTES
from polyshard.core.weight_table import attach_layouts
from polyshard.testing import run_ranks
from polyshard.testing.memory import PeakMemory


@contextlib.contextmanager
def on_one_rank():
    context = ps.initialize("torch")
    yield context
    ps.shutdown(context)


def load(directory, dtype=torch.float32, build=decoder.build_model):
    with on_one_rank() as context:
        model = build(ps.read_config(directory), context).to(dtype)
        ps.load_checkpoint(model, directory, context)
    return model


def load_and_save(source, target, sizes, dtype):
    """On every rank; the saved directory holds logical tensors, whatever the layout."""
    context = ps.initialize("torch", timeout=60, **sizes)
    model = decoder.build_model(ps.read_config(source), context).to(dtype)
    ps.load_checkpoint(model, source, context)
    ps.save_checkpoint(model, target, context, config=ps.read_config(source))
    ps.shutdown(context)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_transformers_dequantized_ones(tmp_path, kind, tensor):
    if not kind.startswith("fp8"):
        pytest.importorskip("compressed_tensors")
    save_quantized(tmp_path / "a", kind)
    run_ranks(load_and_save, tensor, tmp_path / "a", tmp_path / "b", {"tensor": tensor}, torch.bfloat16)
    found = load_file(tmp_path / "b" / "model.safetensors")
    wanted = dequantized_by_transformers(tmp_path / "a", kind, torch.float32)
    assert set(found) == {name for name in wanted if not name.endswith("scale")}
    assert all(torch.equal(found[name], wanted[name].bfloat16()) for name in found)


def test_blocks_that_a_shard_cuts_keep_their_scales(tmp_path):
    """64 rows of a block of 128 on each rank, and a last block of 72 columns."""
    model = save_quantized(tmp_path / "a", "fp8 in blocks", intermediate_size=200)
    run_ranks(load_and_save, 2, tmp_path / "a", tmp_path / "b", {"tensor": 2}, torch.float32)
    found = load_file(tmp_path / "b" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert (found[name] - value).abs().max() <= 2.0**-4 * value.abs().max(), name  # e4m3fn has three bits


def test_a_saved_model_does_not_say_that_it_is_quantized(tmp_path, caplog):
    save_quantized(tmp_path / "a", "fp8 in blocks")
    load_and_save(tmp_path / "a", tmp_path / "b", {}, torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert "dequantized 14 tensors" in caplog.text
    assert "quantization_config is left out of config.json" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(load(tmp_path / "a").parameters(), load(tmp_path / "b").parameters()))


def test_scales_count_where_the_configuration_is_silent(tmp_path):
    save_quantized(tmp_path / "a", "int8 by channel")
    stated = load(tmp_path / "a")
    edit_config(tmp_path / "a", lambda fields: fields.pop("quantization_config"))
    assert all(torch.equal(a, b) for a, b in zip(stated.parameters(), load(tmp_path / "a").parameters()))


def edit_config(directory, change):
    file = directory / "config.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize("case", OTHERS)
def test_other_codes_are_refused_by_name_and_nothing_is_loaded(tmp_path, case):
    save_other(tmp_path / "a", case)
    with on_one_rank() as context:
        model = decoder.build_model(ps.read_config(tmp_path / "a"), context)
        before = {name: value.clone() for name, value in model.named_parameters()}
        with pytest.raises(ps.CheckpointError, match=r"q_proj|quant_method='"):
            ps.load_checkpoint(model, tmp_path / "a", context)
        assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_a_configuration_that_states_codes_beside_plain_weights_is_refused(tmp_path):
    save_tiny(tmp_path / "a", "llama", **SHAPE)
    edit_config(tmp_path / "a", lambda fields: fields.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(ps.CheckpointError, match="contradicts its configuration: got quantization_config"):
        load(tmp_path / "a")


@pytest.mark.parametrize("extra", [{"transform_config": {"R1": {}}}, {"sparsity_config": {"format": "sparse-24"}}])
def test_other_transforms_of_compressed_tensors_are_refused(tmp_path, extra):
    save_quantized(tmp_path / "a", "int8 by channel")
    edit_config(tmp_path / "a", lambda fields: fields["quantization_config"].update(extra))
    with pytest.raises(ps.CheckpointError, match=next(iter(extra))):
        load(tmp_path / "a")


class Scaled(torch.nn.Module):
    """Weights whose names look like another format's scales."""

    def __init__(self, config, parallel_context):
        super().__init__()
        self.up = ps.column_parallel(8, 8, parallel_context)
        self.scales, self.token_blocks = torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(4, 8))


def test_a_models_own_weights_may_be_called_scales(tmp_path):
    wanted = {"up.weight": torch.randn(8, 8), "scales": torch.randn(8), "token_blocks": torch.randn(4, 8)}
    save_file(wanted, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    model = load(tmp_path, build=Scaled)
    assert all(torch.equal(wanted[name], value) for name, value in model.named_parameters())


def test_a_training_state_of_codes_is_refused(tmp_path):
    config = tiny_config("llama", **SHAPE)
    with on_one_rank() as context:
        engine = ps.load_adapter("torch").engine(decoder.build_model(config, context), ps.AdamW(), context)
        ps.save_training_state(engine, tmp_path / "a", context, step=1, config=config)
        tensors = load_file(tmp_path / "a" / "model.safetensors")
        name = "model.layers.0.self_attn.q_proj.weight"
        save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, tmp_path / "a" / "model.safetensors")
        with pytest.raises(ps.CheckpointError, match="q_proj.weight in float8_e4m3fn"):
            ps.load_training_state(engine, tmp_path / "a", context, verify=False)


class Experts(torch.nn.Module):
    """gpt-oss's own names around experts that are cut over the ranks; `[experts, in, out]`."""

    def __init__(self, config, parallel_context):
        super().__init__()
        rank = parallel_context.get_tensor_parallel_rank()
        size = parallel_context.get_tensor_parallel_world_size()
        h, f, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
        layouts = {
            "gate_up_proj": ps.WeightLayout(shape=(experts, h, 2 * f), dim=2),
            "down_proj": ps.WeightLayout(shape=(experts, f, h), dim=1),
        }
        for name, layout in layouts.items():
            setattr(self, name, torch.nn.Parameter(torch.zeros(layout.local_shape(rank, size))))
        attach_layouts(self, layouts, rank, size)


def load_experts(source, target, tensor):
    context = ps.initialize("torch", timeout=60, tensor=tensor)
    config = ps.read_config(source)
    model = torch.nn.Module()
    model.add_module("model", torch.nn.ModuleDict({"layers": torch.nn.ModuleList()}))
    for _ in range(2):
        experts = torch.nn.ModuleDict({"experts": Experts(config, context)})
        model.model["layers"].append(torch.nn.ModuleDict({"mlp": experts}))
    model.bfloat16()
    others = ["*norm*", "*attn*", "*router*", "*embed*", "lm_head*", "*bias"]
    ps.load_checkpoint(model, source, context, ignore=others)
    ps.save_checkpoint(model, target, context, config=config)
    ps.shutdown(context)


@pytest.mark.parametrize("scales", ["float", "ue8m0"])
def test_a_directory_that_transformers_wrote_is_loaded(tmp_path, scales):
    save_fp8_by_transformers(tmp_path / "a", tmp_path / "plain", scale_fmt=scales)
    model = load(tmp_path / "a", torch.bfloat16)
    wanted = dequantized_by_transformers(tmp_path / "a", "fp8", torch.bfloat16)
    down = model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(down, wanted["model.layers.1.mlp.down_proj.weight"])


@pytest.mark.parametrize("tensor", [1, 2])
def test_experts_in_mxfp4_are_transformers_dequantized_ones(tmp_path, tensor):
    save_gpt_oss(tmp_path / "a")
    run_ranks(load_experts, tensor, tmp_path / "a", tmp_path / "b", tensor)
    found, wanted = load_file(tmp_path / "b" / "model.safetensors"), gpt_oss_by_transformers(tmp_path / "a")
    assert len(found) == 4
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_dequantizing_takes_a_few_buckets_beside_the_weights(tmp_path):
    """Six matrices of 8 MB of codes; in float32 all of them would be 200 MB."""
    shape, names = (1024, 8192), [f"layers.{i}.weight" for i in range(6)]
    codes = {name: torch.ones(shape).to(torch.float8_e4m3fn) for name in names}
    save_file(codes | {f"{name}_scale": torch.full((1024, 1), 0.5) for name in names}, tmp_path / "model.safetensors")
    with on_one_rank() as context:
        layers = [ps.column_parallel(8192, 1024, context) for _ in names]
        model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)}).bfloat16()
        with PeakMemory() as memory:
            ps.load_checkpoint(model, tmp_path, context)
    assert all((parameter == 0.5).all() for parameter in model.parameters())
    assert memory.bytes < 8 * BUCKET_BYTES
