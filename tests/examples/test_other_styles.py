"""Models written as nanoGPT's and torchtitan's files are, with their weights; the oracle is transformers."""

from dataclasses import asdict

import nanogpt
import pytest
import titan
import torch
import transformers
from safetensors.torch import save_file
from support.models.other_styles import losses_over_two
from support.models.tiny import tiny_model
from support.oracles.greedy import assert_same_generation, greedy_transformers

import polyshard as ps
from polyshard.testing import run_ranks

PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40))]
TOKENS, BOUND = 6, 2e-5
VOCAB = 131


def nanogpt_case(folder):
    """transformers' GPT-2, and its weights as nanoGPT saves them: linear weights `[out, in]`."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=128, **sizes, bos_token_id=None, eos_token_id=None, activation_function="gelu"
    )
    theirs = tiny_model(config)
    theirs.save_pretrained(folder / "theirs")
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {
        name: (tensor.T if name.endswith(transposed) else tensor).contiguous()
        for name, tensor in theirs.state_dict().items()
        if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    return theirs, nanogpt.GPTConfig(block_size=128, vocab_size=VOCAB, **sizes), weights


def titan_case(folder):
    """transformers' Llama, and its weights as torchtitan saves them: rotated pairs are neighbours."""
    args = titan.TransformerModelArgs(
        vocab_size=VOCAB, dim=64, n_layers=2, n_heads=2, n_kv_heads=1, multiple_of=16, max_seq_len=128
    )
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=args.dim,
        intermediate_size=args.ffn_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=args.max_seq_len,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = tiny_model(config)
    theirs.save_pretrained(folder / "theirs")
    renamed = {
        "model.embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "model.": "",
        "self_attn": "attention",
        "q_proj": "wq",
        "k_proj": "wk",
        "v_proj": "wv",
        "o_proj": "wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # from halves to neighbours
            tensor = tensor.unflatten(0, (-1, 2, 16)).transpose(1, 2).flatten(0, 2)
        for old, new in renamed.items():
            name = name.replace(old, new)
        weights[name] = tensor.contiguous()
    return theirs, args, weights


CASES = {"nanogpt": (nanogpt_case, nanogpt), "titan": (titan_case, titan)}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    make, module = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    theirs, config, weights = make(folder)
    checkpoint = ps.save_config(folder / "own", asdict(config), architecture="OtherStyle")
    save_file(weights, checkpoint / "model.safetensors")
    return folder, theirs, config, module


def batch():
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    return ids, torch.cat((ids[:, 1:], torch.full((2, 1), -100)), dim=1)


def test_loss_and_gradients_are_those_of_transformers(case):
    folder, theirs, config, module = case
    context = ps.initialize("torch")
    model = module.build_model(config, context)
    ps.load_checkpoint(model, folder / "own", context)
    ids, labels = batch()
    loss = model(ids, labels=labels)
    loss.backward()
    want = theirs(input_ids=ids, labels=ids).loss
    theirs.zero_grad()
    want.backward()
    assert abs(float(loss - want)) < 1e-5
    norms = [
        torch.stack([p.grad.norm() for p in m.parameters()]).norm() for m in (model, theirs)
    ]  # of all parameters together: the layouts differ
    assert abs(float(norms[0] / norms[1]) - 1) < 1e-4


@pytest.mark.parametrize("adapter", ["torch", "megatron"])
def test_two_ranks_give_the_loss_of_one(case, adapter):
    folder, theirs, config, module = case
    ids, labels = batch()
    want = float(theirs(input_ids=ids, labels=ids).loss)
    for loss in run_ranks(losses_over_two, 2, module.__name__, config, str(folder / "own"), adapter, ids, labels):
        assert abs(loss - want) < 1e-5


@pytest.mark.vllm
@pytest.mark.parametrize("adapter", ["vllm", "torch"])
def test_served_they_generate_as_transformers(case, adapter):
    from support.engines import engine, greedy

    folder, _, config, module = case
    ps.register_model("OtherStyle", module.build_model, adapter=adapter, config_type=type(config))
    with engine(folder / "own", max_model_len=128) as llm:
        assert_same_generation(
            greedy(llm, PROMPTS, TOKENS), greedy_transformers(folder / "theirs", PROMPTS, TOKENS), BOUND
        )
