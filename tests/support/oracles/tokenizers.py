"""Tokenizers of every kind as their files are published, each trained on a few sentences, without a network."""

import base64
import io
import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Déjà vu: a naïve café, 3.14 and 1,000 more; 東京 and Москва.",
    "def f(x):\n    return x ** 2  # squares\n",
    *("hello world, hello there, hello again " * 3).split(","),
]
TEXTS = [*CORPUS, "Hello<|im_end|> a new  word\tand\n\nlines 🙂", "  leading and trailing  "]
PATTERN = r"\s?\w+|\s+|[^\s\w]+"
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
RAG = "RAG {% for m in messages %}{{ m['content'] }}{% endfor %}"


def _write(directory, **files):
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))


def _byte_pairs():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def tokenizer_json(directory):
    """With several chat templates: `chat_template.jinja` and `additional_chat_templates/`."""
    fast = PreTrainedTokenizerFast(tokenizer_object=_byte_pairs(), eos_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    fast.chat_template = {"default": TEMPLATE, "rag": RAG}
    fast.save_pretrained(directory)


def tokenizer_json_alone(directory):
    _byte_pairs().save(str(directory / "tokenizer.json"))


def unigram_json(directory):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(directory)


def vocab_txt(directory):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    _write(directory, vocab__txt="".join(f"{word}\n" for word, _ in words))
    _write(directory, tokenizer_config__json={"tokenizer_class": "BertTokenizer", "do_lower_case": True})


def vocab_and_merges(directory):
    """With the older files of added and special tokens, and `chat_template` in `tokenizer_config.json`."""
    model = json.loads(_byte_pairs().to_str())["model"]
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    end = {"<|endoftext|>": 0, "<|im_end|>": len(model["vocab"])}
    _write(directory, vocab__json=model["vocab"], merges__txt=f"#version: 0.2\n{merges}", added_tokens__json=end)
    _write(directory, special_tokens_map__json={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    settings = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": TEMPLATE}
    _write(directory, tokenizer_config__json=settings)


def _sentences(directory, file, settings, **options):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2, hard_vocab_limit=False, **options
    )
    (directory / file).write_bytes(model.getvalue())
    _write(directory, tokenizer_config__json=settings)


def spiece_model(directory):
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 4}
    _sentences(directory, "spiece.model", settings, vocab_size=100, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


def sentencepiece_bpe_model(directory):
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    options = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 360, "unk_id": 0, "bos_id": 1, "eos_id": 2}
    _sentences(directory, "tokenizer.model", settings, **options)


def _ranks():
    """Pieces of bytes in the order of their merges, as a tiktoken file has them."""
    to_byte = {letter: value for value, letter in _letters().items()}
    vocabulary = json.loads(_byte_pairs().to_str())["model"]["vocab"]
    pieces = [bytes(to_byte[letter] for letter in piece) for piece in vocabulary if piece != "<|endoftext|>"]
    single = sorted(piece for piece in pieces if len(piece) == 1)
    return single + [piece for piece in pieces if len(piece) > 1]


def _letters():
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in kept]
    return {value: chr(value) for value in kept} | {value: chr(256 + i) for i, value in enumerate(others)}


def _tiktoken(directory, file):
    lines = [f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(_ranks())]
    (directory / file).write_text("".join(lines))


def tiktoken_in_tokenizer_model(directory):
    """Like Llama 3's `tokenizer.model`, which is no sentencepiece model; transformers reads it by its content."""
    _tiktoken(directory, "tokenizer.model")
    _write(directory, tokenizer_config__json={"tokenizer_class": "PreTrainedTokenizerFast"})


CODE = """
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from transformers import PreTrainedTokenizer

from .pattern_mine import PATTERN


class MyTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "mine.tiktoken"}

    def __init__(self, vocab_file, **settings):
        ranks = load_tiktoken_bpe(vocab_file)
        self.encoding = tiktoken.Encoding("mine", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        super().__init__(**settings)

    @property
    def vocab_size(self):
        return self.encoding.n_vocab

    def get_vocab(self):
        return {str(i): i for i in range(self.vocab_size)}

    def _tokenize(self, text):
        return [str(i) for i in self.encoding.encode_ordinary(text)]

    def _convert_token_to_id(self, token):
        return int(token)

    def _convert_id_to_token(self, index):
        return str(index)

    def convert_tokens_to_string(self, tokens):
        return self.encoding.decode([int(token) for token in tokens])
"""


def tiktoken_file_with_code(directory):
    """Like Qwen's first and Kimi's: a `*.tiktoken` file, read by the Python files that `auto_map` names."""
    _tiktoken(directory, "mine.tiktoken")
    _write(directory, tokenization_mine__py=CODE, pattern_mine__py=f"PATTERN = {PATTERN!r}")
    auto_map = {"AutoTokenizer": ["tokenization_mine.MyTokenizer", None]}
    _write(directory, tokenizer_config__json={"tokenizer_class": "MyTokenizer", "auto_map": auto_map})


def tekken_json(directory):
    """Mistral's own file."""
    pieces = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for rank, piece in enumerate(_ranks())
    ]
    special = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
    special += ("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    settings = {"pattern": PATTERN, "num_vocab_tokens": len(pieces), "default_vocab_size": len(pieces) + 20}
    settings |= {"default_num_special_tokens": 20, "version": "v7"}
    tokens = [{"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(special)]
    _write(directory, tekken__json={"config": settings, "vocab": pieces, "special_tokens": tokens})


def bytes_without_a_vocabulary(directory):
    _write(directory, tokenizer_config__json={"tokenizer_class": "ByT5Tokenizer"})


KINDS = {
    "tokenizer.json": (tokenizer_json, ()),
    "tokenizer.json alone": (tokenizer_json_alone, ()),
    "unigram tokenizer.json": (unigram_json, ()),
    "vocab.txt": (vocab_txt, ()),
    "vocab.json and merges.txt": (vocab_and_merges, ()),
    "spiece.model": (spiece_model, ("sentencepiece", "google.protobuf")),
    "sentencepiece tokenizer.model": (sentencepiece_bpe_model, ("sentencepiece", "google.protobuf")),
    "tiktoken tokenizer.model": (tiktoken_in_tokenizer_model, ("tiktoken",)),
    "mine.tiktoken": (tiktoken_file_with_code, ("tiktoken",)),
    "tekken.json": (tekken_json, ()),
    "bytes": (bytes_without_a_vocabulary, ()),
}
