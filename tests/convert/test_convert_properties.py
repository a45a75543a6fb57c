"""Random small models of every family, in random dtypes, through every chain of two formats: equal logits or a refusal.

The oracle is transformers' logits of the original with its weights rounded as asked. What may be refused is stated here
by format, so that a converter that refuses too much fails as well. `POLYSHARD_EXAMPLES=50` tries more models on each
chain.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.models.tiny import tiny_model
from support.oracles.conversions import save_gguf, save_module, with_config
from support.oracles.megatron_legacy import save_legacy

import polyshard as ps
from polyshard.config.decoder_spec import DecoderSpec
from polyshard.convert import convert
from polyshard.convert.format import Options

EXAMPLES = int(os.environ.get("POLYSHARD_EXAMPLES", "3"))
SOURCES = (
    *("huggingface", "huggingface-bin", "gguf", "llama", "megatron-torch-dist", "megatron-legacy", "deepspeed"),
    *("deepspeed-universal", "torch-dcp"),
)
WRITTEN = ("huggingface", "llama", "megatron-torch-dist")
CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LLAMA31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@st.composite
def ropes(draw):
    """Rotary embeddings of every type that transformers has for these families, most of them plain."""
    theta = draw(st.sampled_from((10000.0, 500000.0, 1234.5)))
    kind = draw(st.sampled_from(("default", "default", "llama3", "llama3 small", "linear", "yarn", "dynamic")))
    extra = {
        "default": {},
        "llama3": {"factor": draw(st.sampled_from((8.0, 32.0))), **LLAMA31},
        "llama3 small": {"factor": 4.0, **LLAMA31, "original_max_position_embeddings": 32},
        "linear": {"factor": draw(st.sampled_from((2.0, 1.5)))},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
        "dynamic": {"factor": 2.0},
    }[kind]
    return {"rope_type": kind.partition(" ")[0], "rope_theta": theta, **extra}


@st.composite
def configs(draw):
    """A small configuration of one of the families with the options that it knows."""
    family = draw(st.sampled_from(tuple(CLASSES)))
    heads = draw(st.sampled_from((2, 4)))
    head_dim = draw(st.sampled_from((8, 16)))
    fields = {
        "vocab_size": draw(st.integers(40, 90)),
        "hidden_size": heads * head_dim,
        "intermediate_size": draw(st.sampled_from((24, 36, 50))),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])),
        "max_position_embeddings": 256,
        "rms_norm_eps": draw(st.sampled_from((1e-5, 1e-6, 1e-2))),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": draw(ropes()),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "qwen3" or (family != "qwen2" and draw(st.booleans())):
        fields["head_dim"] = draw(st.sampled_from((head_dim, 32)))
    if family in ("llama", "qwen3"):
        fields["attention_bias"] = draw(st.booleans())
    if family == "llama":
        fields["mlp_bias"] = draw(st.booleans())
    if family == "mistral":
        fields["sliding_window"] = draw(st.sampled_from((None, 7)))
    if family in ("qwen2", "qwen3") and draw(st.booleans()):
        fields |= {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": draw(st.integers(0, 3))}
    return CLASSES[family](**fields)


def holds(form, config):
    """Whether a format has a place for the model, by its documentation; see docs/how-to/convert.md."""
    spec, rope = DecoderSpec.of(config.to_dict()), dict(config.rope_parameters)
    biases = (spec.qkv_bias, spec.output_bias, spec.mlp_bias)
    if form == "llama":
        plain = not any(biases) and not spec.qk_norm and len(set(spec.windows)) == 1
        return plain and rope["rope_type"] in ("default", "llama3")
    if form.startswith("megatron"):
        fixed = all(rope.get(name) == value for name, value in LLAMA31.items())
        scaling = {"default": True, "llama3": fixed, "linear": float(rope.get("factor", 0)).is_integer()}
        known = biases in ((False, False, False), (True, False, False), (True, True, True))
        return known and scaling.get(rope["rope_type"], False)
    if form == "gguf":  # what llama.cpp's own converter writes of these families
        return not any(window is not None for window in spec.windows) and rope["rope_type"] in ("default", "linear")
    return True


def save(form, model, directory, draw):
    """The model as the format's own programs write it."""
    state = model.state_dict()
    if form == "huggingface":
        model.save_pretrained(directory, max_shard_size=draw(st.sampled_from(("5GB", "20KB"))))
    elif form == "huggingface-bin":
        model.config.save_pretrained(directory)
        torch.save(state, directory / "pytorch_model.bin")
    elif form == "gguf":
        directory.mkdir()
        family = "llama" if model.config.model_type == "mistral" else model.config.model_type
        rope = model.config.rope_parameters
        linear = {f"{family}.rope.scaling.type": "linear", f"{family}.rope.scaling.factor": rope.get("factor")}
        save_gguf(directory / "m.gguf", model, family, linear if rope["rope_type"] == "linear" else {})
    elif form == "megatron-legacy":
        layers = model.config.num_hidden_layers
        stages = (
            draw(st.sampled_from(((), (layers - 1, 1)))) if layers > 1 and not model.config.tie_word_embeddings else ()
        )
        whole = all(size % 2 == 0 for size in (model.config.num_key_value_heads, model.config.vocab_size))
        save_legacy(directory, model, tensor=draw(st.sampled_from((1, 2))) if whole else 1, stages=stages)
    elif form == "deepspeed":
        save_module(directory, {f"module.{name}": value for name, value in state.items()})
    elif form == "deepspeed-universal":
        for name, value in state.items():
            (directory / "zero" / name).mkdir(parents=True)
            torch.save({"param": value.float()}, directory / "zero" / name / "fp32.pt")
    elif form == "torch-dcp":
        torch.distributed.checkpoint.save({"model": state}, checkpoint_id=directory, no_dist=True)
    else:  # written by polyshard; their own programs load them in test_convert.py
        model.save_pretrained(directory.with_name("made"))
        sizes = [n for n in (1, 2) if form == "llama" and _divides(model.config, n)] or [1]
        options = Options(
            tensor_parallel=draw(st.sampled_from(sizes)), padded_vocabulary=draw(st.sampled_from((1, 32)))
        )
        convert(directory.with_name("made"), directory, to_format=form, options=options)
        (directory / "config.json").unlink()
    return directory


def _divides(config, size):
    counts = (config.num_attention_heads, config.num_key_value_heads, config.vocab_size, config.intermediate_size)
    return all(count % size == 0 for count in counts)


def logits(config, state):
    """In float32, with the model's tables in float32 too: `to` would round them with the weights."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict({name: value.float() for name, value in state.items()})
    ids = torch.arange(40)[None] * 7 % config.vocab_size
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("second", WRITTEN)
@pytest.mark.parametrize("first", SOURCES)
def test_a_random_model_through_two_formats(first, second):
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),  # a failing example is small already
        suppress_health_check=list(HealthCheck),
    )
    @given(config=configs(), dtype=st.sampled_from(DTYPES), cast=st.sampled_from((None, *DTYPES)), data=st.data())
    def check(config, dtype, cast, data):
        root = Path(tempfile.mkdtemp(prefix="polyshard-chain-"))
        try:
            _check(root, first, second, config, dtype, cast, data.draw)
        finally:
            shutil.rmtree(root)

    check()


def _check(root, first, second, config, dtype, cast, draw):
    model = tiny_model(config, seed=draw(st.integers(0, 99))).to(dtype)
    if not holds(first, config):
        if first in WRITTEN:
            with pytest.raises(ps.CheckpointError):
                save(first, model, root / "first", draw)
            assert not (root / "first").exists()
        return
    if first in ("gguf", "deepspeed-universal"):
        model = model.float()  # as they store them
    source = save(first, model, root / "first", draw)
    given = first not in ("huggingface", "huggingface-bin", "gguf")
    options = with_config(config) if given else Options(allow_pickle=True)
    if not holds(second, config):
        with pytest.raises(ps.CheckpointError):
            convert(source, root / "second", to_format=second, options=options)
        assert sorted(path.name for path in root.iterdir() if path.name != "made") == ["first"]
        return
    convert(source, root / "second", to_format=second, options=options)
    convert(root / "second", root / "third", dtype=cast, options=Options(allow_pickle=True))
    found, told = transformers.AutoModelForCausalLM.from_pretrained(
        root / "third", dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    wanted = model if cast is None else model.to(cast)
    assert {value.dtype for value in found.state_dict().values()} == {next(wanted.parameters()).dtype}
    difference = (logits(found.config, found.state_dict()) - logits(config, wanted.state_dict())).abs().max()
    assert difference <= (1e-4 if first == "gguf" else 0.0)  # GGUF has the norm's epsilon in float32
