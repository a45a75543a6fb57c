"""Everything beside the weights comes along through every format, and a note names what stays behind."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support.models.tiny import save_tiny, tiny_config, tiny_model
from support.oracles.conversions import ALLOW, save_gguf, with_config
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import polyshard as ps
from polyshard.convert import convert

SHAPE = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64},
}
FILES = (
    *("vocab.txt", "spiece.model", "qwen.tiktoken", "tokenizer.model", "chat_template.jinja", "LICENSE", "README.md"),
    *("processor_config.json", "preprocessor_config.json", "additional_chat_templates/rag.jinja", "modeling_mine.py"),
)


@pytest.fixture
def source(tmp_path):
    """A directory with a file of every kind beside its weights."""
    directory = save_tiny(tmp_path / "a", "llama", **SHAPE)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(directory)
    for name in FILES:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(name)
    for name in ("trainer_state.json", "optimizer.pt", "rng_state.pth", "training_args.bin"):
        (directory / name).write_bytes(b"x")
    (directory / "onnx").mkdir()
    (directory / "onnx" / "model.onnx").write_bytes(b"x")
    return directory


@pytest.mark.parametrize("through", ["huggingface", "llama", "megatron-torch-dist"])
def test_all_but_weights_and_training_state_comes_along(tmp_path, source, through):
    done = convert(source, tmp_path / "b", to_format=through)
    convert(tmp_path / "b", tmp_path / "c", options=ALLOW)
    for name in (*FILES, "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "c" / name).read_bytes() == (source / name).read_bytes(), name
    assert not any((tmp_path / "c" / name).exists() for name in ("optimizer.pt", "trainer_state.json", "onnx"))
    told = " ".join(done.notes)
    assert all(name in told for name in ("onnx/", "trainer_state.json", "training_args.bin"))


def test_a_source_without_a_tokenizer_is_told(tmp_path):
    done = convert(save_tiny(tmp_path / "a", "llama"), tmp_path / "b")
    assert any("has no tokenizer" in note for note in done.notes)


def _words(count):
    return [f"w{i}" for i in range(count)]


def test_a_tokenizer_of_gguf_comes_along(tmp_path):
    """A byte-pair tokenizer as llama.cpp stores GPT-2's; ids and special tokens are those of the file."""
    from transformers import AutoTokenizer

    letters = [chr(c) for c in range(33, 127)]
    tokens = ["<s>", "</s>", *letters, "th", "the", *[f"<extra{i}>" for i in range(128 - 2 - len(letters) - 2)]]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * 126,
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ messages }}",
    }
    file = save_gguf(tmp_path / "m.gguf", tiny_model(tiny_config("llama", **SHAPE)), "llama", metadata)
    done = convert(file, tmp_path / "out")
    assert any("tokenizer (gpt2, smollm) was converted by transformers" in note for note in done.notes)
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.convert_ids_to_tokens(list(range(128))) == tokens
    assert (found.bos_token_id, found.eos_token_id, found.chat_template) == (0, 1, "{{ messages }}")
    assert found("the", add_special_tokens=False)["input_ids"] == [tokens.index("the")]
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (0, 1)


def test_a_tokenizer_of_gguf_that_cannot_be_converted_is_told(tmp_path):
    metadata = {"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": _words(128)}
    file = save_gguf(tmp_path / "m.gguf", tiny_model(tiny_config("llama", **SHAPE)), "llama", metadata)
    done = convert(file, tmp_path / "out")
    assert any("tokenizer is left out" in note for note in done.notes), done.notes


def named_code(place, files, tokenizer=False):
    """A model whose configuration, or whose tokenizer's, names Python files; they would end the process if they ran."""
    place.mkdir()
    save_file({"w": torch.ones(2)}, place / "model.safetensors")
    auto_map = {"AutoConfig": "configuration_mine.Mine", "AutoModel": "modeling_mine.Mine"}
    in_config = {} if tokenizer else {"auto_map": auto_map}
    (place / "config.json").write_text(json.dumps({"model_type": "mine", **in_config}))
    if tokenizer:
        named = {"AutoTokenizer": ["configuration_mine.Mine", None], "AutoProcessor": "other/repository--code.Mine"}
        (place / "tokenizer_config.json").write_text(json.dumps({"auto_map": named}))
    for name, text in files.items():
        (place / name).write_text(text)


END = "raise SystemExit"
LACKING = {
    "a module": ({"configuration_mine.py": END}, False, "modeling_mine.py is missing: config.json's auto_map, "),
    "an import of a module": (
        {"configuration_mine.py": END, "modeling_mine.py": f"from .layers import A\n{END}"},
        *(False, "layers.py is missing: modeling_mine.py names it"),
    ),
    "an import of an import": (
        {"configuration_mine.py": f"from . import a\n{END}", "a.py": "from .b import c", "modeling_mine.py": END},
        *(False, "b.py is missing: a.py names it"),
    ),
    "a tokenizer's module": ({}, True, "configuration_mine.py is missing: tokenizer_config.json's auto_map, "),
}


@pytest.mark.parametrize("case", LACKING)
def test_code_that_a_configuration_names_must_be_there(tmp_path, case):
    files, tokenizer, said = LACKING[case]
    named_code(tmp_path / "a", files, tokenizer)
    with pytest.raises(ps.CheckpointError, match=said):
        convert(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_code_that_is_there_comes_along_and_is_not_run(tmp_path):
    files = {"configuration_mine.py": END, "modeling_mine.py": f"from .layers import A\n{END}", "layers.py": END}
    named_code(tmp_path / "a", files)
    convert(tmp_path / "a", tmp_path / "b")
    assert all((tmp_path / "b" / name).read_text() == text for name, text in files.items())


def test_saving_takes_all_but_weights_along_and_names_code_that_lacks(tmp_path, source):
    context = ps.initialize("torch")
    model = ps.column_parallel(4, 4, context)
    config = {"model_type": "mine", "auto_map": {"AutoModel": "modeling_mine.Mine"}}
    with pytest.raises(ps.CheckpointError, match=r"modeling_mine.py is missing.*Pass companions="):
        ps.save_checkpoint(model, tmp_path / "b", context, config=config)
    assert not (tmp_path / "b").exists()
    ps.save_checkpoint(model, tmp_path / "b", context, config=config, companions=source)
    ps.shutdown(context)
    beside = (*FILES, "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    written = {"config.json", "model.safetensors", "polyshard.json"}
    found = {str(path.relative_to(tmp_path / "b")) for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert found == {*beside, *written}


def test_every_file_of_a_target_is_recorded_with_its_checksum(tmp_path, source):
    convert(source, tmp_path / "b")
    recorded = json.loads((tmp_path / "b" / "polyshard.json").read_text())["files"]
    assert {"additional_chat_templates/rag.jinja", "spiece.model", "tokenizer.json"} <= set(recorded)


def test_a_configuration_directory_of_a_format_without_one_gives_no_tokenizer_in_silence(tmp_path, source):
    model = tiny_model(tiny_config("llama", **SHAPE))
    torch.distributed.checkpoint.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    done = convert(tmp_path / "dcp", tmp_path / "b", options=with_config(model.config))
    assert any("has no tokenizer" in note for note in done.notes)
