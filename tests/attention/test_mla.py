"""Multi-head latent attention against transformers' DeepSeek-V3, over two ranks, and in a real vLLM engine."""

import pytest
import torch
from support.models import latent
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

import polyshard as ps
from polyshard.testing import run_ranks


def theirs_of(q_lora_rank, interleave):
    config = DeepseekV3Config(
        hidden_size=latent.HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=q_lora_rank,
        **latent.SIZES,
        rope_interleave=interleave,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    module = DeepseekV3Attention(config, 0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=0.1 if parameter.dim() == 1 else 0.0, std=0.3)
    return config, module


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("q_lora_rank", [None, 20])
def test_output_and_gradients_equal_transformers(q_lora_rank, interleave):
    config, theirs = theirs_of(q_lora_rank, interleave)
    rotary = ps.RotaryEmbedding(config.qk_rope_head_dim, theta=config.rope_parameters["rope_theta"])
    ours = ps.TrainableMLA(
        latent.HIDDEN, 4, q_lora_rank=q_lora_rank, **latent.SIZES, rotary=rotary, interleaved=interleave
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 10, latent.HIDDEN)
    positions = torch.arange(10).expand(2, 10)
    mask = torch.full((10, 10), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 10, 10)
    want = theirs(x, DeepseekV3RotaryEmbedding(config)(x, positions), mask)[0]
    got = ours(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for out in (got, want):
        out.square().sum().backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        bound = 1e-5 * float(wanted[name].abs().max())
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=bound)


@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_two_ranks_equal_one(axis):
    for pairs in run_ranks(latent.over_two, 2, axis):
        for got, wanted in pairs:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())))


def test_what_it_has_not_got_is_refused():
    with pytest.raises(ps.ConfigurationError, match="qk_rope_head_dim is invalid: got 7, expected an even number"):
        ps.TrainableMLA(32, 4, **{**latent.SIZES, "qk_rope_head_dim": 7})


PROMPT = list(range(3, 40))


def assert_serves(llm, model, bound=2e-5):
    """Log-probabilities of a prompt and of its greedy answer are the trainer's."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=6, temperature=0, prompt_logprobs=0, logprobs=0, detokenize=False)
    out = llm.generate([{"prompt_token_ids": PROMPT}], parameters, use_tqdm=False)[0]
    answer = list(out.outputs[0].token_ids)
    whole = torch.tensor(PROMPT + answer)
    with torch.no_grad():
        own = model.compute_logits(model(whole)).log_softmax(-1)
    served = [step[i].logprob for step, i in zip(out.prompt_logprobs[1:], PROMPT[1:])]
    served += [step[i].logprob for step, i in zip(out.outputs[0].logprobs, answer)]
    wanted = own[:-1].gather(-1, whole[1:, None]).flatten()
    torch.testing.assert_close(torch.tensor(served), wanted, rtol=0, atol=bound)
    assert answer == own[len(PROMPT) - 1 : -1].argmax(-1).tolist()


@pytest.mark.vllm
def test_a_served_model_gives_the_trainers_numbers(tmp_path):
    from support.engines import engine

    _, model = latent.checkpoint(tmp_path / "mla")
    ps.register_model("Latent", latent.build)
    with engine(tmp_path / "mla", "Latent") as llm:
        assert_serves(llm, model)


@pytest.mark.vllm
@pytest.mark.parametrize("adapter", ["vllm", "torch"])
def test_vllms_latent_cache_gives_the_trainers_numbers_after_a_sync_too(tmp_path, monkeypatch, adapter):
    from support.engines import engine

    from polyshard.adapters.vllm.compat import MLAAttention, local_worker

    context, model = latent.checkpoint(tmp_path / "mla", **latent.take_deepseek_sizes(monkeypatch))
    ps.register_model("Latent", latent.build, adapter=adapter)
    with engine(tmp_path / "mla", "Latent", attention_backend="CPU_MLA") as llm:  # also where vLLM would take AMX's
        kinds = [type(module) for module in local_worker(llm).model.modules()]
        assert kinds.count(MLAAttention) == latent.CONFIG["num_hidden_layers"]
        assert_serves(llm, model, bound=2e-4)  # weights absorbed into the query: sums of 512 terms in another order
        for share in (True, False):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.9)
            with ps.WeightSync(model, context, llm, share=share) as sync:
                sync()
                assert_serves(llm, model, bound=2e-4)


@pytest.mark.vllm
def test_a_latent_that_vllms_kernels_lack_is_refused_with_the_way_out(tmp_path, monkeypatch):
    from support.engines import engine

    _, model = latent.checkpoint(tmp_path / "mla", model_type="deepseek_v3", q_lora_rank=20, **latent.SIZES)
    ps.register_model("Latent", latent.build)
    refused = pytest.raises(ps.RegistrationError, match="keys of 36: (CPU|AMX)_MLA supports only 576. VLLM_MLA_D")
    with refused, engine(tmp_path / "mla", "Latent"):
        pass
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    with engine(tmp_path / "mla", "Latent") as llm:
        assert_serves(llm, model)


@pytest.mark.vllm
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="the backend of processors with AMX")
def test_amx_serves_bfloat16_and_refuses_what_it_would_compute_wrongly(tmp_path, monkeypatch):
    from support.engines import engine

    fields = latent.take_deepseek_sizes(monkeypatch)
    latent.checkpoint(tmp_path / "odd", **fields)
    ps.register_model("Latent", latent.build)
    for dtype, reason in (("float32", "does not support torch.float32"), ("bfloat16", "v_head_dim, got 20 and 16")):
        refused = pytest.raises(ps.RegistrationError, match=f"AMX_MLA .*{reason}. Start .*attention_backend='CPU_MLA'")
        with refused, engine(tmp_path / "odd", "Latent", dtype=dtype):
            pass
    even = {"qk_nope_head_dim": 32, "v_head_dim": 32}
    monkeypatch.setattr(latent, "SIZES", {**latent.SIZES, **even})
    usual = latent.initial  # scores so small that bfloat16 alone is 0.02 from float32
    monkeypatch.setattr(latent, "initial", lambda *given: usual(*given) / (1 if len(given[1]) < 2 else 3))
    context, model = latent.checkpoint(tmp_path / "even", **{**fields, **even})
    with engine(tmp_path / "even", "Latent", dtype="bfloat16") as llm:
        assert_serves(llm, model, bound=0.05)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        with ps.WeightSync(model, context, llm) as sync:
            sync()
            assert_serves(llm, model, bound=0.05)
