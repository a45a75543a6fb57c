"""`--verify` compares source and target by readers that took no part in the conversion, and fails on injected faults.

Each fault is one that a converter of the past had: it is put back here, and the proof must find it.
"""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.models.tiny import save_tiny, tiny_config, tiny_model
from support.oracles.conversions import ALLOW, SCALED, save_gguf, save_module, with_config
from typer.testing import CliRunner

import polyshard as ps
from polyshard.adapters.fairscale import llama_format, llama_params
from polyshard.adapters.fairscale.llama_format import LlamaFormat
from polyshard.adapters.megatron import dist_format
from polyshard.cli.app import app
from polyshard.convert import casting, convert
from polyshard.convert import convert as run
from polyshard.convert.huggingface import HuggingFaceFormat

SHAPE = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 512},
}


def _fails(tmp_path, source, message="verification failed", **settings):
    with pytest.raises(ps.CheckpointError, match=message):
        convert(source, tmp_path / "target", verify=True, **settings)
    assert not (tmp_path / "target").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_scaling_that_is_not_written_is_found(tmp_path, monkeypatch):
    save_tiny(tmp_path / "a", "llama", **SHAPE, rope_parameters=SCALED)
    honest = llama_params.params_of

    def forgetful(config, spec):
        params, notes = honest(config, spec)
        return {
            name: value for name, value in params.items() if "rope_scaling" not in name and "scaled" not in name
        }, notes

    monkeypatch.setattr(llama_format, "params_of", forgetful)
    _fails(tmp_path, tmp_path / "a", to_format="llama")


def test_scaling_that_is_not_read_is_found(tmp_path, monkeypatch):
    save_tiny(tmp_path / "a", "llama", **SHAPE, rope_parameters=SCALED)
    convert(tmp_path / "a", tmp_path / "llama", to_format="llama")
    honest = LlamaFormat.read

    def forgetful(self, path, options):
        foreign = honest(self, path, options)
        plain = {"rope_theta": 5000.0, "rope_type": "default"}
        return replace(foreign, config={**foreign.config, "rope_parameters": plain})

    monkeypatch.setattr(LlamaFormat, "read", forgetful)
    _fails(tmp_path, tmp_path / "llama", "logits differ", options=ALLOW)


FAULTS = {
    "interleaved twice": lambda full, spec: full,
    "heads exchanged": lambda full, spec: full.flip(0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_permutation_is_found_though_it_reads_back(tmp_path, monkeypatch, fault):
    """Both directions wrong in the same way: polyshard alone would find no difference."""
    save_tiny(tmp_path / "a", "llama", **SHAPE)
    monkeypatch.setattr(llama_format, "_interleaved", FAULTS[fault])
    monkeypatch.setattr(llama_format, "_half_rotated", FAULTS[fault])
    _fails(tmp_path, tmp_path / "a", "logits differ", to_format="llama")


def test_arguments_of_megatron_that_are_wrong_are_found(tmp_path, monkeypatch):
    save_tiny(tmp_path / "a", "llama", **SHAPE, rms_norm_eps=1e-2)
    honest = dist_format.arguments_of
    monkeypatch.setattr(dist_format, "arguments_of", lambda *a: honest(*a) | {"norm_epsilon": 1e-6})
    monkeypatch.setattr(dist_format, "check_arguments", lambda *a: None)
    _fails(tmp_path, tmp_path / "a", "logits differ .*by Megatron-Core's GPTModel", to_format="megatron-torch-dist")


def test_biases_that_megatron_would_not_find_are_found(tmp_path, monkeypatch):
    save_tiny(tmp_path / "a", "llama", **SHAPE, attention_bias=True, mlp_bias=True)
    honest = dist_format.from_hugging_face

    def forgetful(tensors, spec, padded):
        made = honest(tensors, spec, padded)
        return {name: value for name, value in made.items() if not name.endswith("linear_fc2.bias")}

    monkeypatch.setattr(dist_format, "from_hugging_face", forgetful)
    _fails(tmp_path, tmp_path / "a", r"linear_fc2.bias", to_format="megatron-torch-dist")


def test_a_cast_to_infinity_is_found(tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "a", "llama", **SHAPE)
    state = load_file(source / "model.safetensors")
    state["model.norm.weight"][0] = 1e5
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(casting, "checked_cast", lambda name, values, casts: values.to(casts.dtype))
    _fails(tmp_path, source, "with weights in the dtype written, are not finite", dtype=torch.float16)


@pytest.mark.parametrize("kind", ["deepspeed", "torch-dcp"])
def test_a_configuration_that_drops_tensors_is_found(tmp_path, monkeypatch, kind):
    """As before tensors were accounted for: the reader takes what the configuration names and no more."""
    model = tiny_model(tiny_config("qwen2", num_hidden_layers=4, **SHAPE))
    wrong = with_config(tiny_config("qwen2", num_hidden_layers=2, **SHAPE))
    if kind == "deepspeed":
        source = save_module(tmp_path / "source", model.state_dict())
    else:
        source = tmp_path / "source"
        torch.distributed.checkpoint.save(model.state_dict(), checkpoint_id=source, no_dist=True)
    monkeypatch.setattr("polyshard.adapters.shared.hugging_face_names.account", lambda *a: None)
    _fails(
        tmp_path,
        source,
        "the source by .* does not match the configuration: .*unexpected tensors model.layers",
        options=wrong,
    )


def test_a_configuration_that_changes_between_the_two_is_found(tmp_path, monkeypatch):
    save_tiny(tmp_path / "a", "llama", **SHAPE)
    honest = HuggingFaceFormat.read

    def forgetful(self, path, options):
        foreign = honest(self, path, options)
        return replace(foreign, config={**foreign.config, "rms_norm_eps": 1e-2})

    monkeypatch.setattr(HuggingFaceFormat, "read", forgetful)
    _fails(tmp_path, tmp_path / "a", "logits differ")


def test_a_missing_tensor_in_the_target_is_found_by_transformers(tmp_path, monkeypatch):
    """Of a family that polyshard has no list for; transformers would initialize it anew."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SHAPE, num_hidden_layers=2, head_dim=16)
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, metadata={"format": "pt"})
    _fails(tmp_path, tmp_path / "a", "missing tensors model.layers.1.mlp.up_proj.weight")


def test_what_was_compared_is_reported(tmp_path):
    save_tiny(tmp_path / "a", "llama", **SHAPE)
    done = convert(tmp_path / "a", tmp_path / "llama", to_format="llama", verify=True)
    assert done.compared == (
        "21 tensors read back, bit for bit",
        "logits of 320 tokens: the source by transformers, the target by Meta's reference forward",
    )
    assert done.not_compared == ()
    model = tiny_model(tiny_config("llama", **SHAPE))
    file = save_gguf(tmp_path / "m.gguf", model, "llama")
    done = convert(file, tmp_path / "gguf", verify=True)
    assert done.compared[1].endswith("the source by transformers' GGUF loader, the target by transformers")


def test_a_mixture_of_experts_is_compared_by_transformers_in_the_dtype_that_it_runs_in(tmp_path):
    """Its tensors have other names in the model than in the file; polyshard copies the file's."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SHAPE, num_hidden_layers=2, num_local_experts=4)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "a")
    done = convert(tmp_path / "a", tmp_path / "b", verify=True)
    assert (done.logits, done.not_compared) == (0.0, ())


def test_what_was_not_compared_is_reported(tmp_path):
    """A model that transformers does not know, and ranks that DeepSpeed has no code to join."""
    place = tmp_path / "a"
    place.mkdir()
    save_file({"w": torch.ones(2)}, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps({"model_type": "mine", "vocab_size": 3}))
    done = convert(place, tmp_path / "b", verify=True)
    assert (done.verified, done.logits) == (1, None)
    assert any("transformers cannot load" in line for line in done.not_compared)
    model = tiny_model(tiny_config("llama", **SHAPE))
    source = save_module(tmp_path / "ds", model.state_dict())
    torch.save({"module": model.state_dict()}, source / "step" / "mp_rank_01_model_states.pt")
    done = convert(source, tmp_path / "c", options=with_config(model.config), verify=True)
    assert done.logits is not None
    assert done.compared[1].startswith("logits of 320 tokens: the source by polyshard's own reader")
    assert "DeepSpeed has no code that joins the files of 2 ranks" in done.not_compared[0]


def test_the_command_line_reports_both(tmp_path):
    save_tiny(tmp_path / "a", "llama", **SHAPE)
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "llama", "--verify"])
    assert done.exit_code == 0, done.output
    assert "compared 21 tensors read back, bit for bit" in done.output
    assert "the target by Meta's reference forward" in done.output
    assert "verified: 21 fingerprints equal, logits equal within " in done.output


def test_megatron_is_not_needed_for_the_rest_of_the_proof(tmp_path, monkeypatch):
    save_tiny(tmp_path / "a", "llama", **SHAPE)
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = run(tmp_path / "a", tmp_path / "b", to_format="megatron-torch-dist", verify=True)
    assert (done.verified, done.logits) == (21, None)
    assert done.not_compared == ("logits: megatron-core is not installed",)
