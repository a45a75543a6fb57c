"""A tokenizer of every kind survives a chain of two formats: transformers loads it, and it gives the same ids."""

import pytest
import transformers
from support.models.tiny import save_tiny
from support.oracles.conversions import ALLOW
from support.oracles.tokenizers import KINDS, TEXTS
from transformers import dynamic_module_utils

from polyshard.convert import convert

SHAPE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "a", "llama", **SHAPE)


@pytest.fixture(params=KINDS)
def source(request, tmp_path, model, monkeypatch):
    """A model's directory with the files of one tokenizer."""
    write, needed = KINDS[request.param]
    for library in needed:
        pytest.importorskip(library)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "a").mkdir()
    for file in model.iterdir():
        (tmp_path / "a" / file.name).symlink_to(file)
    write(tmp_path / "a")
    return tmp_path / "a"


def load(directory):
    return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=True)


def behaviour(directory):
    """What a user of the tokenizer sees."""
    tokenizer = load(directory)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    return {
        "class": type(tokenizer).__name__,
        "ids": ids,
        "texts": [tokenizer.decode(row) for row in ids],
        "vocabulary": tokenizer.get_vocab(),
        "special tokens": tokenizer.special_tokens_map,
        "chat templates": tokenizer.chat_template,
    }


@pytest.mark.parametrize("through", ["llama", "megatron-torch-dist"])
def test_ids_texts_and_special_tokens_are_those_of_the_source(tmp_path, source, through):
    wanted = behaviour(source)
    assert len({i for row in wanted["ids"] for i in row}) > 20  # not all unknown
    notes = convert(source, tmp_path / "b", to_format=through).notes
    notes += convert(tmp_path / "b", tmp_path / "c", options=ALLOW).notes
    assert not any("holds no tokenizer" in note for note in notes)
    for directory in (source, tmp_path / "b"):
        directory.rename(directory.with_suffix(".away"))
    assert behaviour(tmp_path / "c") == wanted
