"""Attention features in a real vLLM engine, and the engine's own kernel in training."""

import copy
import json

import pytest
import torch
from support.engines import engine
from support.models import featured
from support.models.tiny import save_built

import polyshard as ps

pytestmark = pytest.mark.vllm

PROMPTS = [list(range(1, 41)), [5, 9, 9, 3, 1], [100, 7, 30, 31, 32, 33, 8, 8]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The model as training holds it, and its checkpoint."""
    directory = tmp_path_factory.mktemp("featured") / "model"
    model = save_built(directory, featured)
    assert json.loads((directory / "config.json").read_text())["head_dim"] == 32
    return model, directory


def prompt_logprobs(llm, prompts):
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    return [
        torch.tensor([step[i].logprob for step, i in zip(out.prompt_logprobs[1:], p[1:])])
        for out, p in zip(outputs, prompts)
    ]


def own_logprobs(model, prompt):
    with torch.no_grad():
        logits = model.compute_logits(model(torch.tensor(prompt)))
    return logits.float().log_softmax(-1)[:-1].gather(-1, torch.tensor(prompt[1:])[:, None]).flatten()


def check_syncs_of_sinks(llm, model):
    """The engine's attention uses new sinks, also after vLLM's own reload has replaced the parameters."""
    changed = copy.deepcopy(model)
    with ps.WeightSync(changed, ps.initialize("torch"), llm) as sync:
        for reload in (False, True):
            if reload:
                llm.collective_rpc("reload_weights")
            with torch.no_grad():
                for name, parameter in changed.named_parameters():
                    if "sinks" in name or reload:
                        parameter.mul_(0.7)
            sync()
            (found,) = prompt_logprobs(llm, PROMPTS[:1])
            torch.testing.assert_close(found, own_logprobs(changed, PROMPTS[0]), rtol=0, atol=1e-4)


def test_every_feature_reaches_the_engine_and_its_kernel_gives_its_numbers(trained, monkeypatch):
    model, directory = trained
    monkeypatch.setenv("VLLM_CPU_ATTN_SPLIT_KV", "0")
    ps.register_model("Featured", featured.build, adapter="torch")
    with engine(directory, "Featured") as llm:
        served = [prompt_logprobs(llm, [prompt])[0] for prompt in PROMPTS]
        generated = llm.generate([{"prompt_token_ids": PROMPTS[0][:4]}], use_tqdm=False)[0]
        check_syncs_of_sinks(llm, model)
    assert generated.outputs[0].token_ids
    exactly = copy.deepcopy(model).double()
    for prompt, theirs in zip(PROMPTS, served):
        with torch.no_grad():
            logits = exactly.compute_logits(exactly(torch.tensor(prompt)))
        want = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(prompt[1:])[:, None]).flatten().float()
        # In float32 every kernel of ours and the engine's are up to 4e-5 from float64 on this model.
        torch.testing.assert_close(theirs, want, rtol=0, atol=1e-4)
        torch.testing.assert_close(own_logprobs(model, prompt), want, rtol=0, atol=1e-4)
        monkeypatch.setenv("POLYSHARD_ATTENTION", "vllm")
        same_kernel = own_logprobs(model, prompt)
        monkeypatch.delenv("POLYSHARD_ATTENTION")
        torch.testing.assert_close(same_kernel, want, rtol=0, atol=1e-4)


def test_gradients_through_the_engines_kernel_are_those_of_the_others(trained, monkeypatch):
    model, _ = trained
    gradients = []
    for kernel in ("chunked", "vllm"):
        monkeypatch.setenv("POLYSHARD_ATTENTION", kernel)
        model.zero_grad()
        hidden = model(torch.tensor(PROMPTS[0] + PROMPTS[1]), cu_seqlens=torch.tensor([0, 40, 45]))
        model.compute_logits(hidden).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()))


def test_a_window_that_only_the_config_names_is_refused(trained, tmp_path):
    """vLLM would put the config's window on every layer that names none."""
    model, _ = trained
    config = {**featured.CONFIG, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    ps.save_checkpoint(model, tmp_path / "windowed", ps.initialize("torch"), config=config)
    ps.register_model("FeaturedWindowed", featured.build, adapter="torch")
    refused = pytest.raises(ps.RegistrationError, match="requests sliding_window=None, but vLLM reads 8")
    with refused, engine(tmp_path / "windowed", "FeaturedWindowed"):
        pass
