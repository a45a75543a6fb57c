"""A saved directory is a Hugging Face directory, whatever the config was given as."""

import argparse
import dataclasses
import json
import types
from collections import namedtuple

import decoder
import pytest
import torch
import transformers
from support.models.transformers_configs import ALL

import polyshard as ps

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CLASSES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
}
IDS = torch.arange(20).view(2, 10) % 48


class FieldsOfAClass:
    """Fields as attributes of the class, as training scripts have them."""

    model_type = "llama"

    def __init__(self, fields):
        self.__dict__.update({name: value for name, value in fields.items() if name != "model_type"})


def as_dataclass(fields):
    return dataclasses.make_dataclass("Config", list(fields))(**fields)


def as_named_tuple(fields):
    return namedtuple("Config", list(fields))(**fields)


KINDS = {
    "a dict": dict,
    "a mapping inside": types.MappingProxyType,
    "a namespace": lambda fields: types.SimpleNamespace(**fields),
    "argparse's": lambda fields: argparse.Namespace(**fields),
    "a dataclass": as_dataclass,
    "a named tuple": as_named_tuple,
    "polyshard's": lambda fields: ps.ModelConfig(**fields),
    "a class with a model type": FieldsOfAClass,
}


def same_in_transformers(directory, model, vocabulary):
    with torch.no_grad():
        expected = model.eval().compute_logits(model(IDS))
        found = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        torch.testing.assert_close(found(IDS).logits, expected[..., :vocabulary], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_config_object_of_a_written_decoder(tmp_path, name):
    config = CLASSES[name](**SIZES, tie_word_embeddings=name == "qwen2")
    context = ps.initialize()
    model = decoder.build_model(config, context)
    ps.initialize_weights(model, context, seed=0)
    ps.save_checkpoint(model, tmp_path / "saved", context, config=config)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == name
    same_in_transformers(tmp_path / "saved", model, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_every_other_kind_of_config(tmp_path, kind):
    fields = transformers.LlamaConfig(**SIZES).to_dict()
    fields = {name: value for name, value in fields.items() if name.isidentifier() and not name.startswith("_")}
    config = KINDS[kind](fields)
    context = ps.initialize()
    model = decoder.build_model(config, context)
    ps.initialize_weights(model, context, seed=0)
    ps.save_checkpoint(model, tmp_path / "saved", context, config=config)
    same_in_transformers(tmp_path / "saved", model, 48)
    again = ps.save_config(tmp_path / "alone", config)
    written = [json.loads((path / "config.json").read_text()) for path in (again, tmp_path / "saved")]
    assert {**written[0], "dtype": "float32"} == written[1]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["given", "the model's own", "read"])
def test_models_of_transformers(tmp_path, name, kind):
    config = ALL[name]
    context = ps.initialize()
    model = ps.transformers_model(config, context)
    ps.initialize_weights(model, context, seed=0)
    chosen = {"given": config, "the model's own": model.config, "read": None}[kind]
    if chosen is None:
        chosen = ps.read_config(ps.save_config(tmp_path / "alone", config))
    ps.save_checkpoint(model, tmp_path / "saved", context, config=chosen)
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert fields["model_type"] == config.model_type
    assert fields["architectures"] == [type(transformers.AutoModelForCausalLM.from_config(config)).__name__]
    assert not [name for name in fields if "attn_implementation" in name]
    same_in_transformers(tmp_path / "saved", model, config.vocab_size)


def test_a_config_without_a_model_type_is_polyshards(tmp_path):
    fields = dict(SIZES)
    ps.save_config(tmp_path, as_dataclass(fields))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "polyshard"


def test_what_is_no_config_and_no_json_is_named(tmp_path):
    for wrong in (3, "llama", transformers.LlamaConfig):
        with pytest.raises(ps.ConfigurationError, match="the config has no fields: got"):
            ps.save_config(tmp_path, wrong)
    with pytest.raises(ps.CheckpointError, match="the config is not plain JSON: .*device"):
        ps.save_config(tmp_path, {"device": torch.device("cpu")})
