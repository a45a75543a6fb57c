"""A config.json that describes no model ends in an error that names the file and the field, on every path."""

import copy
import json
import pickle

import decoder
import pytest
import transformers
from support.models.tiny import save_tiny, tiny_config
from support.oracles.conversions import ALLOW, with_config

import polyshard as ps
from polyshard.config.decoder_spec import FAMILIES
from polyshard.config.file import check_fields
from polyshard.convert import convert


def build(directory, target):
    context = ps.initialize("torch")
    try:
        decoder.build_model(ps.read_config(directory), context)
    finally:
        ps.shutdown(context)


def serve(directory, target):
    pytest.importorskip("vllm")
    from polyshard.cli.serve import server_command

    server_command(directory, "decoder:build_model", False, [])


PATHS = {
    "decoder.py": build,
    "convert": lambda directory, target: convert(directory, target),
    "convert to another format": lambda directory, target: convert(directory, target, to_format="llama"),
    "serve": serve,
}
WRONG = {
    **{f"no {name}": (lambda f, n=name: f.pop(n), name) for name in ("vocab_size", "rms_norm_eps", "hidden_size")},
    "a key that is no field": (lambda f: f.update({"self": 1}), "'self'"),
    "a key that is a method": (lambda f: f.update(to_dict=1), "'to_dict'"),
    **{
        f"{name}={value!r}": (lambda f, n=name, v=value: f.update({n: v}), f"{name} is wrong: got {value!r}")
        for name, value in (
            *(("sliding_window", 2.5), ("sliding_window", True), ("sliding_window", "64"), ("vocab_size", "131")),
            *(("num_attention_heads", 4.0), ("rms_norm_eps", "1e-5"), ("tie_word_embeddings", "false")),
        )
    },
}


@pytest.mark.parametrize(("field", "value"), [("num_local_experts", "8"), ("norm_topk_prob", "yes"), ("n_group", 1.5)])
def test_sizes_of_experts_have_their_types(field, value):
    with pytest.raises(ps.CheckpointError, match=f"config.json: {field} is wrong: got {value!r}, expected"):
        check_fields({field: value}, "config.json")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("config") / "model", "mistral")


def spoil(original, directory, change):
    """The same weights beside a changed config.json."""
    directory.mkdir()
    (directory / "model.safetensors").symlink_to(original / "model.safetensors")
    fields = json.loads((original / "config.json").read_text())
    change(fields)
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("path", PATHS)
def test_file_and_field_are_named(tmp_path, original, path, case):
    change, said = WRONG[case]
    directory = spoil(original, tmp_path / "a", change)
    with pytest.raises(ps.ConfigurationError, match="a/config.json") as caught:
        PATHS[path](directory, tmp_path / "b")
    assert said in str(caught.value)
    assert isinstance(caught.value, ps.CheckpointError), "callers that catch these go on to do so"
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("case", WRONG)
def test_a_configuration_beside_another_formats_files_is_checked_too(tmp_path, original, case):
    change, said = WRONG[case]
    convert(original, tmp_path / "meta", to_format="llama")
    file = tmp_path / "meta" / "config.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))
    with pytest.raises(ps.ConfigurationError, match="meta/config.json") as caught:
        convert(tmp_path / "meta", tmp_path / "b", options=ALLOW)
    assert said in str(caught.value)


@pytest.mark.parametrize("window", [2.5, True, 0, "64"])
def test_a_window_that_is_no_count_is_refused_in_a_configuration_without_a_file(window):
    context = ps.initialize("torch")
    fields = tiny_config("mistral").to_dict() | {"sliding_window": window}
    with pytest.raises(ps.ConfigurationError, match="sliding_window is (wrong|invalid): got"):
        decoder.build_model(ps.ModelConfig(**fields), context)
    ps.shutdown(context)


def test_a_missing_field_is_a_missing_attribute_all_the_same(original):
    config = ps.read_config(original)
    assert getattr(config, "n_embd", 7) == 7
    assert not hasattr(config, "n_embd")
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), ps.ModelConfig(**config.to_dict())):
        assert other == config
        assert other.to_dict() == json.loads((original / "config.json").read_text())
        with pytest.raises(ps.ConfigurationError, match="n_embd is missing"):
            _ = other.n_embd


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_complete(tmp_path, family):
    """Its files leave out what has the default of every model, and nothing that is asked for here."""
    config = tiny_config(family)
    type(config)().save_pretrained(tmp_path)
    assert ps.read_config(tmp_path).vocab_size == type(config)().vocab_size
    with_config(ps.read_config(tmp_path).to_dict())


OTHERS = ("Gemma3TextConfig", "GptOssConfig", "DeepseekV3Config", "Phi3Config", "GPT2Config", "MixtralConfig")


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_families_are_read(tmp_path, name):
    getattr(transformers, name)().save_pretrained(tmp_path)
    assert ps.read_config(tmp_path).model_type
