"""Nothing is dropped in a conversion: every tensor of the source is carried, known to be redundant, or listed.

Sources: NVIDIA/Megatron-LM#346 and NeMo Megatron-Bridge#5545 (biases), meta-llama/llama#427 (a configuration that
does not
belong to the checkpoint).
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.models.tiny import save_tiny, tiny_config, tiny_model
from support.oracles.conversions import ALLOW, IDS, logits, save_gguf, save_module, with_config

import polyshard as ps
from polyshard.convert import convert
from polyshard.convert.format import Options

SHAPE = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 512},
}
BIASES = {"attention_bias": True, "mlp_bias": True}


def _stored(tmp_path, model, kind):
    """The model in each format that holds no configuration of its own."""
    place = tmp_path / kind
    if kind == "deepspeed":
        return save_module(place, model.state_dict())
    if kind == "torch-dcp":
        torch.distributed.checkpoint.save(model.state_dict(), checkpoint_id=place, no_dist=True)
        return place
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", place, to_format="megatron-torch-dist")
    (place / "config.json").unlink()
    return place


KINDS = ("megatron-torch-dist", "deepspeed", "torch-dcp")


@pytest.mark.parametrize("kind", KINDS)
def test_biases_of_attention_and_mlp_come_along(tmp_path, kind):
    model = tiny_model(tiny_config("llama", **SHAPE, **BIASES))
    model.save_pretrained(tmp_path / "original")
    convert(_stored(tmp_path, model, kind), tmp_path / "back", options=with_config(model.config))
    assert torch.equal(logits(tmp_path / "back"), logits(tmp_path / "original"))


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}])
def test_biases_that_megatron_cannot_hold_are_refused(tmp_path, changes):
    save_tiny(tmp_path / "hf", "llama", **SHAPE, **changes)
    with pytest.raises(
        ps.CheckpointError, match="Megatron's arguments cannot express this model: got biases of q, k and v"
    ):
        convert(tmp_path / "hf", tmp_path / "meg", to_format="megatron-torch-dist")
    with pytest.raises(ps.CheckpointError, match="Llama's format has no place for biases"):
        convert(tmp_path / "hf", tmp_path / "llama", to_format="llama")


WRONG = {
    "2 of 4 layers": ("qwen2", {"num_hidden_layers": 2}),
    "5 of 4 layers": ("qwen2", {"num_hidden_layers": 5}),
    "no biases": ("llama", {"num_hidden_layers": 4}),
    "no window, QK norms": ("qwen3", {"num_hidden_layers": 4, "head_dim": 16}),
    "vocabulary 100 of 128": ("qwen2", {"num_hidden_layers": 4, "vocab_size": 100}),
    "vocabulary 130 of 128": ("qwen2", {"num_hidden_layers": 4, "vocab_size": 130}),
    "tied": ("qwen2", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "narrow MLP": ("qwen2", {"num_hidden_layers": 4, "intermediate_size": 48}),
    "other heads": ("qwen2", {"num_hidden_layers": 4, "num_key_value_heads": 1}),
}


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """The same Qwen2 in every format, without configurations beside it."""
    root = tmp_path_factory.mktemp("accounting")
    model = tiny_model(tiny_config("qwen2", num_hidden_layers=4, **SHAPE))
    return {kind: _stored(root, model, kind) for kind in KINDS} | {"huggingface": root / "hf", "model": model}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("kind", [*KINDS, "huggingface"])
def test_a_configuration_of_another_model_is_refused(tmp_path, qwen2, kind, case):
    family, changes = WRONG[case]
    options = with_config(tiny_config(family, **{**SHAPE, **changes}))
    with pytest.raises(ps.CheckpointError):
        convert(qwen2[kind], tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_configuration_is_taken(tmp_path, qwen2, kind):
    convert(qwen2[kind], tmp_path / "out", options=with_config(qwen2["model"].config))
    assert torch.equal(logits(tmp_path / "out"), logits(qwen2["huggingface"]))


EXTRA = {
    "a third layer": {"model.layers.2.mlp.up_proj.weight": torch.ones(96, 64)},
    "a prediction layer": {"mtp.0.proj.weight": torch.ones(64, 64)},
    "an adapter": {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 64)},
    "a value head": {"v_head.weight": torch.ones(1, 64)},
    "attention sinks": {"model.layers.0.self_attn.sinks": torch.ones(4)},
    "a bias": {"model.norm.bias": torch.ones(64)},
    "scales": {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)},
}


@pytest.mark.parametrize("case", EXTRA)
@pytest.mark.parametrize("kind", ["deepspeed", "torch-dcp", "to megatron", "to llama"])
def test_tensors_that_are_not_the_models_are_listed(tmp_path, kind, case):
    model = tiny_model(tiny_config("llama", **SHAPE))
    state, name = model.state_dict() | EXTRA[case], next(iter(EXTRA[case]))
    to_format, options = "huggingface", with_config(model.config)
    if kind == "deepspeed":
        source = save_module(tmp_path / "source", state)
    elif kind == "torch-dcp":
        source = tmp_path / "source"
        torch.distributed.checkpoint.save(state, checkpoint_id=source, no_dist=True)
    else:
        source, options = tmp_path / "source", Options()
        to_format = {"to megatron": "megatron-torch-dist", "to llama": "llama"}[kind]
        model.save_pretrained(source)
        save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ps.CheckpointError, match=name.replace(".", r"\.")):
        convert(source, tmp_path / "out", options=options, to_format=to_format)


def test_between_hugging_face_directories_they_are_carried_and_named(tmp_path):
    save_tiny(tmp_path / "a", "llama", **SHAPE)
    file = tmp_path / "a" / "model.safetensors"
    save_file(load_file(file) | EXTRA["a value head"], file, metadata={"format": "pt"})
    done = convert(tmp_path / "a", tmp_path / "b", verify=True)
    assert "v_head.weight" in load_file(tmp_path / "b" / "model.safetensors")
    assert any(
        "carried 1 tensors that are not part of the configuration's model: v_head.weight" in n for n in done.notes
    )
    assert done.not_compared == ("tensors that transformers does not load: v_head.weight",)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "of an unknown family"])
def test_a_wrappers_prefix_is_refused_in_hugging_face_directories(tmp_path, prefix, kind):
    save_tiny(tmp_path / "a", "llama", **SHAPE)
    file = tmp_path / "a" / "model.safetensors"
    state = {prefix + name: value for name, value in load_file(file).items()}
    file.unlink()
    if kind == "bin":
        torch.save(state, tmp_path / "a" / "pytorch_model.bin")
    else:
        save_file(state, file)
    if kind == "of an unknown family":
        (tmp_path / "a" / "config.json").write_text('{"model_type": "mine", "vocab_size": 3}')
    with pytest.raises(ps.CheckpointError, match=f"holds the names of a wrapper: got '{prefix}' before every tensor"):
        convert(tmp_path / "a", tmp_path / "b", options=ALLOW)


@pytest.mark.parametrize("kind", ["deepspeed", "torch-dcp"])
def test_a_wrappers_prefix_elsewhere_is_taken_off(tmp_path, kind):
    model = tiny_model(tiny_config("llama", **SHAPE))
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    source = tmp_path / "source"
    if kind == "deepspeed":
        save_module(source, state)
    else:
        torch.distributed.checkpoint.save(state, checkpoint_id=source, no_dist=True)
    convert(source, tmp_path / "out", options=with_config(model.config), verify=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("theta", [10000.0, 20000.0])
def test_a_table_of_frequencies_is_redundant_only_where_the_configuration_gives_it(tmp_path, theta):
    model = tiny_model(tiny_config("llama", **SHAPE))
    table = 1.0 / theta ** (torch.arange(0, 16, 2) / 16)
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": table for i in range(2)}
    source = save_module(tmp_path / "source", model.state_dict() | tables)
    if theta == 10000.0:
        done = convert(source, tmp_path / "out", options=with_config(model.config))
        assert any("left out 2 tables that follow from the configuration" in note for note in done.notes)
    else:
        with pytest.raises(ps.CheckpointError, match="inv_freq belongs to a different rotary embedding"):
            convert(source, tmp_path / "out", options=with_config(model.config))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("to_format", ["llama", "megatron-torch-dist"])
def test_a_head_that_is_stored_beside_a_tied_embedding_is_left_out_only_if_it_is_equal(tmp_path, to_format, tied):
    model = tiny_model(tiny_config("llama", tie_word_embeddings=True, **SHAPE))
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    state = load_file(file)
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"] + (0 if tied else 1)}, file)
    if not tied:
        with pytest.raises(ps.CheckpointError, match="holds a head that is not the embedding"):
            convert(tmp_path / "a", tmp_path / "b", to_format=to_format)
        return
    done = convert(tmp_path / "a", tmp_path / "b", to_format=to_format)
    assert any("lm_head.weight" in note for note in done.notes)
    convert(tmp_path / "b", tmp_path / "c", options=ALLOW)
    assert torch.equal(logits(tmp_path / "c"), logits(tmp_path / "a"))


@pytest.mark.parametrize("to_format", ["huggingface", "llama", "megatron-torch-dist"])
def test_a_tied_model_may_store_its_head_instead_of_its_embedding(tmp_path, to_format):
    """transformers ties them in either direction."""
    model = tiny_model(tiny_config("llama", tie_word_embeddings=True, **SHAPE))
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    state = load_file(file)
    save_file(state | {"lm_head.weight": state.pop("model.embed_tokens.weight")}, file, metadata={"format": "pt"})
    convert(tmp_path / "a", tmp_path / "b", to_format=to_format, verify=True)
    convert(tmp_path / "b", tmp_path / "c", options=ALLOW)
    with torch.no_grad():
        wanted = model(IDS % 128).logits
    assert torch.equal(logits(tmp_path / "c"), wanted)


@pytest.mark.parametrize("part", ["lora", "biases", "QK norms"])
def test_gguf_tensors_that_transformers_passes_over_are_carried_or_listed(tmp_path, part):
    if part == "lora":
        model = tiny_model(tiny_config("llama", **SHAPE))
        extra = {"blk.0.attn_q.weight.lora_a": torch.ones(2, 64)}
        file = save_gguf(tmp_path / "m.gguf", model, "llama", extra=extra)
        with pytest.raises(ps.CheckpointError, match=r"unexpected tensors blk.0.attn_q.weight.lora_a"):
            convert(file, tmp_path / "out")
        return
    family, changes = ("llama", BIASES) if part == "biases" else ("qwen3", {})
    model = tiny_model(tiny_config(family, **SHAPE, **changes))
    model.save_pretrained(tmp_path / "hf")
    convert(save_gguf(tmp_path / "m.gguf", model, family), tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "hf"))


def test_a_classifier_is_copied_as_it_is(tmp_path):
    config = tiny_config("llama", num_labels=3, **SHAPE)
    torch.manual_seed(0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", verify=True)
    assert "score.weight" in load_file(tmp_path / "b" / "model.safetensors")
    with pytest.raises(ps.CheckpointError, match=r"lm_head.weight|score.weight"):
        convert(tmp_path / "a", tmp_path / "c", to_format="llama")


def test_fields_that_are_not_the_functions_come_along_through_every_format(tmp_path):
    save_tiny(tmp_path / "a", "llama", **SHAPE, bos_token_id=5, initializer_range=0.5)
    for to_format in ("llama", "megatron-torch-dist"):
        convert(tmp_path / "a", tmp_path / to_format, to_format=to_format)
        convert(tmp_path / to_format, tmp_path / f"{to_format}-back", options=ALLOW)
        fields = json.loads((tmp_path / f"{to_format}-back" / "config.json").read_text())
        assert (fields["bos_token_id"], fields["initializer_range"]) == (5, 0.5)
