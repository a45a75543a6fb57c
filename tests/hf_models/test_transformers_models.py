"""transformers' models by their own code, with polyshard's layers: trained, sharded, saved, served."""

import contextlib
import copy
import dataclasses

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.engines import engine, greedy
from support.models.transformers_configs import ALL, EXPERTS, HEADS, LFM2, MIXTRAL, SHARDED, WHOLE
from support.oracles.greedy import assert_same_generation, greedy_transformers
from support.scripts import on_engine_ranks
from support.workers.colocated import serve_all
from support.workers.on_families import families_on_axes, original_outcome
from support.workers.on_ranks import dropped_logits, transformers_outcome

import polyshard as ps
from polyshard.core.context import ParallelAxis
from polyshard.core.exact_identity import exact_kernel
from polyshard.testing import run_ranks
from polyshard.transformers.gated import GatedMLP
from polyshard.transformers.kept_attention import is_attention
from polyshard.transformers.replaced.interface import attend

PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40))]
TOKENS, BOUND = 6, 2e-5
IDS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directories = {}

    def save(name):
        if name not in directories:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config({**ALL, **EXPERTS, "mixtral": MIXTRAL}[name])
            for key, weight in model.named_parameters():
                torch.nn.init.normal_(weight, std=0.02 if key.endswith("correction_bias") else 0.15)  # far from uniform
            directories[name] = tmp_path_factory.mktemp("transformers") / "model"
            model.save_pretrained(directories[name])
        return directories[name]

    return save


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def oracle(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    output = model(IDS, labels=IDS, use_cache=False)
    output.loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return output.loss.item(), output.logits.detach(), gradients


LIBRARIES = ("megatron", "deepspeed", "fairscale")


@pytest.mark.parametrize(
    ("name", "tensor", "adapter"),
    [
        *((name, 1, "torch") for name in ALL),
        *((name, 2, "torch") for name in SHARDED),
        ("llama", 4, "torch"),
        *(("qwen3", 2, library) for library in LIBRARIES),
    ],
)
def test_loss_logits_and_gradients_equal_the_originals(saved, name, tensor, adapter):
    directory = saved(name)
    loss, logits, gradients = oracle(directory)
    got = run_ranks(transformers_outcome, tensor, directory, IDS, adapter)[0]
    assert got["loss"] == pytest.approx(loss, abs=2e-5)
    torch.testing.assert_close(got["logits"], logits, rtol=1e-4, atol=2e-4)
    assert got["packed"] == pytest.approx(loss, abs=2e-5)
    assert set(got["gradients"]) == set(gradients)
    for stored, gradient in gradients.items():
        torch.testing.assert_close(got["gradients"][stored], gradient, rtol=2e-3, atol=2e-5, msg=stored)


def test_experts_in_other_tensors_than_one_by_one(saved):
    directories = {name: saved(name) for name in EXPERTS}
    originals = {name: original_outcome(directory) for name, directory in directories.items()}
    axes = {"tensor": directories, "expert": {"granitemoe": directories["granitemoe"]}}
    for got in run_ranks(families_on_axes, 2, axes)[0]:
        for name in got:
            expected = originals[name]
            for part in ("logits", "packed"):
                torch.testing.assert_close(got[name][part], expected[part], rtol=1e-5, atol=1e-5)
            for stored, gradient in expected["gradients"].items():
                near = 1e-5 * float(gradient.abs().max()) + 1e-9
                found = got[name]["gradients"][stored]  # float64, also where transformers keeps float32
                torch.testing.assert_close(found, gradient.double(), rtol=0, atol=near, msg=stored)
    stored, again = (load_file(directories["granitemoe"] / part / "model.safetensors") for part in (".", "again"))
    assert set(stored) == set(again)  # saved at expert parallel 2
    assert all(torch.equal(again[name].float(), tensor) for name, tensor in stored.items())


def test_dropout_does_not_depend_on_the_tensor_parallel_size(tmp_path):
    """... in attention of polyshard's form (Llama), and in attention that keeps its code (Cohere)."""
    directories = []
    for name, config in ((name, ALL[name]) for name in ("llama", "cohere")):
        changed = copy.deepcopy(config)
        changed.attention_dropout = 0.4
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(changed)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.15)
        directories.append(tmp_path / name)
        model.save_pretrained(directories[-1])
    for plain, alone, sharded in run_ranks(dropped_logits, 2, directories, IDS)[0]:
        largest = plain.abs().max().item()
        assert (alone - plain).abs().max() > 0.1 * largest
        torch.testing.assert_close(sharded, alone, rtol=0, atol=1e-4 * largest)


@pytest.mark.vllm
@pytest.mark.parametrize("name", ALL)
def test_served_by_its_own_code_on_vllms_layers_and_cache(saved, name):
    directory = saved(name)
    ps.register_model("ServedAsItIs", "polyshard:transformers_model")
    with engine(directory, "ServedAsItIs", max_num_batched_tokens=32) as llm:  # the longest prompt comes in chunks
        assert_same_generation(greedy(llm, PROMPTS, TOKENS), greedy_transformers(directory, PROMPTS, TOKENS), BOUND)


@pytest.mark.vllm
def test_a_model_with_layers_that_carry_state_is_not_served(tmp_path):
    transformers.AutoModelForCausalLM.from_config(LFM2).save_pretrained(tmp_path)
    ps.register_model("ServedAsItIs", "polyshard:transformers_model")
    words = r"Lfm2ForCausalLM cannot be served: Lfm2ShortConv \(model.layers.0.conv\), which carries state"
    with pytest.raises(ps.RegistrationError, match=words), engine(tmp_path, "ServedAsItIs"):
        pass


@pytest.mark.vllm
def test_served_on_another_librarys_layers(saved):
    directory = saved("gemma3")
    ps.register_model("ServedAsItIs", "polyshard:transformers_model", adapter="torch")
    with engine(directory, "ServedAsItIs") as llm:
        assert_same_generation(greedy(llm, PROMPTS, TOKENS), greedy_transformers(directory, PROMPTS, TOKENS), BOUND)


@pytest.mark.vllm
def test_overridden_rotary_parameters_without_a_base_take_that_of_vllms_own_model(saved, tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    directory = saved("qwen3")
    expected = tmp_path / "expected"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.config.rope_parameters = {**yarn, "rope_theta": 1e6}  # the file has 10000
    model.save_pretrained(expected)
    ps.register_model("ServedAsItIs", "polyshard:transformers_model")
    with engine(directory, "ServedAsItIs", hf_overrides={"rope_parameters": yarn}) as llm:
        assert_same_generation(greedy(llm, PROMPTS, TOKENS), greedy_transformers(expected, PROMPTS, TOKENS), BOUND)


@pytest.mark.vllm
def test_served_at_tensor_parallel_2(saved):
    directories = [saved(name) for name in ("gemma3", "mixtral", "cohere", "olmo2", "granitemoe")]
    asked = [("vllm", directory, "polyshard:transformers_model") for directory in directories]
    for directory, result in zip(directories, on_engine_ranks(serve_all, 2, asked, PROMPTS, TOKENS)[0], strict=True):
        assert_same_generation(result, greedy_transformers(directory, PROMPTS, TOKENS), BOUND)


@pytest.mark.parametrize(
    ("config", "layout", "words"),
    [
        (WHOLE["gpt2"], {"tensor": 2}, "GPT2LMHeadModel has no tensor-parallel plan"),
        (transformers.MixtralConfig(**HEADS, hidden_act="gelu"), {}, "experts' activation is GELUActivation"),
        (SHARDED["llama"], {"pipeline": 2}, "pipeline parallel is unsupported"),
        (transformers.T5Config(), {}, "no causal language model for T5Config"),
        ({"hidden_size": 8}, {}, "the config is unsupported: got dict"),
    ],
)
def test_what_cannot_be_built_says_why(config, layout, words):
    axes = {
        axis: ParallelAxis(name=axis, ranks=tuple(range(size)), rank=0, group=None) for axis, size in layout.items()
    }
    context = dataclasses.replace(ps.initialize(), layout=ps.ParallelLayout(**layout), axes=axes)
    with pytest.raises(ps.ConfigurationError, match=words):
        ps.transformers_model(config, context)


@pytest.mark.vllm  # whose kernel it is on CPU
def test_attention_that_keeps_its_code_uses_the_kernel_of_exact_mode():
    context = ps.initialize(exact=True)
    model = ps.transformers_model(WHOLE["cohere"], context)
    module = next(module for module in model.modules() if is_attention(module))
    q, k, v = torch.randn(3, 40, 4, 32, generator=torch.Generator().manual_seed(0))
    got, _ = attend(module, *(t[None].transpose(1, 2) for t in (q, k[:, :2], v[:, :2])), None)
    assert torch.equal(got[0], ps.packed_attention(q, k[:, :2], v[:, :2], kernel=exact_kernel(context, None)))


@pytest.mark.parametrize("name", SHARDED)
def test_the_same_layers_are_exchanged_in_half_precision(name):
    built = []
    for dtype in (torch.float32, torch.bfloat16):
        with default_dtype(dtype):
            built.append(ps.transformers_model(SHARDED[name], ps.initialize()))
    kinds = [[type(module) for module in model.modules()] for model in built]
    assert kinds[0] == kinds[1]
    assert torch.nn.Linear not in kinds[0]
    assert (GatedMLP in kinds[0]) == (name != "starcoder2")
