"""A trainer reads config.json's fields, a server a config class's object: both build the same model."""

import ast
import copy
import functools
import importlib
import json
import sys
from pathlib import Path

import decoder
import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.paths import TOOLS

import polyshard as ps
from polyshard.config.families import OPTIONAL, REQUIRED, SERVED_BASES
from polyshard.transformers.model import _transformers_config

sys.path.insert(0, str(TOOLS))
families = importlib.import_module("model_families")

SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,  # a multiple of every default number of key-value heads
    "rms_norm_eps": 1e-5,
}
EVERY_FIELD = {
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "attention_bias": True,
    "mlp_bias": True,
    "num_key_value_heads": 16,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "use_sliding_window": True,
    "sliding_window": 5,
    "max_window_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
ROTARY = {
    "none": {},
    "base": {"rope_theta": 5e5},
    "scaling without a base": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "old name of the type": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
    "parameters without a base": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "length beside": {
        "original_max_position_embeddings": 32,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "null": {"rope_scaling": None, "rope_theta": 2e4},
}
CASES = [
    *((kind, {name}, "base") for kind in OPTIONAL for name in (*EVERY_FIELD, "nothing")),
    *((kind, set(), rotary) for kind in OPTIONAL for rotary in ROTARY),
    *((kind, set(EVERY_FIELD), "none") for kind in OPTIONAL),
    *((kind, {"layer_types", "use_sliding_window"}, "base") for kind in OPTIONAL),
    *((kind, {"layer_types", "max_window_layers"}, "base") for kind in OPTIONAL),
]
IDS = torch.arange(24).view(2, 12) % 48


def write_config(directory, kind, fields):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": kind, **fields}))
    return directory


@pytest.mark.parametrize(("kind", "without", "rotary"), CASES)
def test_a_field_that_is_left_out_is_the_same_to_trainer_server_and_transformers(tmp_path, kind, without, rotary):
    pytest.importorskip("vllm", reason="needs vLLM")
    from vllm.transformers_utils.config import get_config

    fields = {name: value for name, value in EVERY_FIELD.items() if name not in without}
    write_config(tmp_path, kind, {**SIZES, **fields, **ROTARY[rotary]})
    if without == {"use_sliding_window"} and kind.startswith("qwen"):  # windows in layer_types, and none to use
        for read in (ps.read_config, transformers.AutoConfig.from_pretrained):
            with pytest.raises(ps.ConfigurationError, match="layer_types is invalid: got .* with a window of None"):
                decoder.DecoderConfig.of(read(tmp_path))
        return
    trained = decoder.DecoderConfig.of(ps.read_config(tmp_path))
    assert decoder.DecoderConfig.of(transformers.AutoConfig.from_pretrained(tmp_path)) == trained
    assert decoder.DecoderConfig.of(get_config(tmp_path, trust_remote_code=False)) == trained

    if "head_dim" in without and (kind == "ministral" or (kind == "mistral" and "layer_types" in fields)):
        return  # transformers' own model raises a TypeError
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    original = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for weight in original.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    tensors = {name: weight.detach().clone() for name, weight in original.named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = decoder.build_model(ps.read_config(tmp_path), ps.initialize()).eval()
    ps.load_checkpoint(model, tmp_path, ps.initialize())
    with torch.no_grad():
        expected = original(IDS, use_cache=False).logits
        torch.testing.assert_close(model.compute_logits(model(IDS)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", OPTIONAL)
def test_a_required_field_that_is_missing_or_no_number_is_named(kind):
    for name in REQUIRED:
        without = {key: value for key, value in SIZES.items() if key != name}
        with pytest.raises(ps.ConfigurationError, match=f"{name} missing. Add them to config.json"):
            ps.complete_config({"model_type": kind, **without})
    for value in (2.5, True, 0, "4"):
        with pytest.raises(ps.ConfigurationError, match="hidden_size is invalid: got .*, expected a positive integer"):
            ps.complete_config({"model_type": kind, **SIZES, "hidden_size": value})
    for name, value in (("tie_word_embeddings", None), ("attention_dropout", True), ("max_position_embeddings", None)):
        with pytest.raises(ps.ConfigurationError, match=f"{name} is invalid: got {value}, expected"):
            ps.complete_config({"model_type": kind, **SIZES, name: value})
    nested = {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}
    with pytest.raises(ps.ConfigurationError, match="for each kind of layer .full_attention, sliding_attention."):
        ps.complete_config({"model_type": kind, **SIZES, "rope_parameters": nested})
    with pytest.raises(ps.ConfigurationError, match="model_type is unsupported: got 'gpt2', expected one of llama"):
        ps.complete_config({"model_type": "gpt2", **SIZES})


def test_every_family_of_transformers_model_is_read_alike_with_each_field_left_out(tmp_path):
    page = (Path(families.__file__).parents[1] / "docs" / "reference" / "transformers-models.md").read_text()
    supported = [name for name in families.families() if f"| `{name}`" in page]  # without variants
    tried = 0
    for name in supported:
        fields = families.small_config(name).to_dict()
        for left_out in (None, *fields):
            if left_out == "model_type" or (left_out is not None and "token_id" in left_out):
                continue
            rest = {key: value for key, value in fields.items() if key != left_out}
            (tmp_path / "config.json").write_text(json.dumps(rest))
            try:
                expected = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
            except Exception:
                with pytest.raises(ps.ConfigurationError):
                    _transformers_config(ps.read_config(tmp_path))
                continue
            got = _transformers_config(ps.read_config(tmp_path)).to_dict()
            expected["_name_or_path"] = got["_name_or_path"] = ""
            assert str(got) == str(expected), (name, left_out)  # NaN equals itself
            tried += 1
    assert tried > 1000


@functools.cache
def bases_in_vllms_source():
    """Model types and the base that vLLM's own model of each sets where none is given."""
    pytest.importorskip("vllm", reason="needs vLLM")
    from vllm.model_executor.models import registry

    folder = Path(registry.__file__).parent
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    types = {}
    for model_type, architecture in names.items():
        types.setdefault(architecture, []).append(model_type)
    found = {}
    for architecture, (module, _) in registry._TEXT_GENERATION_MODELS.items():
        path = folder / f"{module}.py"
        source = path.read_text() if path.is_file() else ""  # some live in packages of their own
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "set_default_rope_theta":
                (base,) = [ast.literal_eval(word.value) for word in node.keywords if word.arg == "default_theta"]
                found |= {model_type: float(base) for model_type in types.get(architecture, ())}
    return found


def test_the_bases_of_vllms_own_models_are_those_in_its_source():
    found = bases_in_vllms_source()
    assert set(found) >= {"qwen2", "qwen3"}
    assert {kind: base for kind, base in found.items() if base != 10000.0} == dict(SERVED_BASES)


@pytest.mark.parametrize("kind", OPTIONAL)
@pytest.mark.parametrize("old_file", [False, True])
def test_overridden_rotary_parameters_take_the_base_that_vllms_own_model_takes(tmp_path, kind, old_file):
    pytest.importorskip("vllm", reason="needs vLLM")
    from vllm.config import ModelConfig

    from polyshard.adapters.vllm.config import fill_rotary_base

    rope = {"rope_theta": 5e5} if old_file else {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    write_config(tmp_path, kind, {**SIZES, "num_attention_heads": 4, "max_position_embeddings": 256, **rope})
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "yarn"}
    overrides = (
        {},
        {"rope_parameters": yarn},
        {"rope_parameters": {**yarn, "rope_theta": 3e4}},
        {"rope_scaling": yarn},
        {"rope_theta": 7e5},
        {"rope_theta": 7e5, "rope_parameters": yarn},
    )
    for override in overrides:
        given = {"num_key_value_heads": 2, **copy.deepcopy(override)}
        served = ModelConfig(str(tmp_path), skip_tokenizer_init=True, hf_overrides=given).hf_config
        expected = dict(served.rope_parameters)  # as vllm/model_executor/models/*.py and get_rope read it
        expected.setdefault("rope_theta", bases_in_vllms_source().get(kind, 10000.0))
        mine = decoder.DecoderConfig.of(served)
        assert mine.rope_theta == expected["rope_theta"], override
        assert (mine.rope_scaling or {}).get("rope_type", "default") == expected["rope_type"]
        fill_rotary_base(served)  # what every factory is given
        assert served.rope_parameters == expected


def test_two_lengths_that_vllm_and_transformers_read_differently_are_refused():
    rope = {"rope_type": "yarn", "factor": 4.0}
    for given in ({**rope, "original_max_position_embeddings": 32}, rope):
        fields = {**SIZES, "rope_scaling": given, "original_max_position_embeddings": 16}
        with pytest.raises(ps.ConfigurationError, match="is ambiguous: got 16 beside the rotary parameters"):
            ps.complete_config({"model_type": "llama", **fields})
