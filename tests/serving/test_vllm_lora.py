"""LoRA adapters on a registered model; the oracle is transformers with the adapter's product added to the weights."""

import json

import decoder
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engines import engine, generated
from support.models.tiny import save_tiny
from support.oracles.greedy import assert_same_generation, greedy_transformers

import polyshard as ps

pytestmark = pytest.mark.vllm

PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11]]
TOKENS, RANK, ALPHA = 8, 4, 16
BOUND = 2e-5
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return save_tiny(folder / "base", "llama", hidden_size=96, head_dim=32)


def make_adapter(base, folder, seed, targets):
    """An adapter's directory as peft writes it, and one with its product merged into the weights."""
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    adapter, merged = {}, dict(weights)
    for name, weight in sorted(weights.items()):
        if not any(f".{target}.weight" in name for target in targets):
            continue
        down = torch.randn(RANK, weight.shape[1], generator=generator) * 0.1
        up = torch.randn(weight.shape[0], RANK, generator=generator) * 0.1
        layer = "base_model.model." + name.removesuffix(".weight")
        adapter |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        merged[name] = weight + (up @ down) * (ALPHA / RANK)
    own, whole = folder / "adapter", folder / "merged"
    own.mkdir(parents=True)
    whole.mkdir()
    save_file(adapter, own / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(targets), "bias": "none"}
    (own / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "base"}))
    save_file(merged, whole / "model.safetensors", metadata={"format": "pt"})
    (whole / "config.json").write_text((base / "config.json").read_text())
    return own, whole


def test_adapters_are_served_in_one_batch_and_the_base_after_them(base, tmp_path):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = [
        make_adapter(base, tmp_path / "all", 1, TARGETS),
        make_adapter(base, tmp_path / "some", 2, TARGETS[1:5]),
    ]
    ps.register_model("ServedLora", decoder.build_model)
    parameters = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": p} for p in PROMPTS]
    requests = [LoRARequest(f"adapter {i}", i + 1, str(own)) for i, (own, _) in enumerate(adapters)]
    chosen = [*(requests[0],) * 2, *(requests[1],) * 2]
    with engine(base, "ServedLora", enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
        outputs = llm.generate(prompts * 2, parameters, lora_request=chosen, use_tqdm=False)
        outputs += llm.generate(prompts, parameters, use_tqdm=False)
    found = generated(outputs)
    wanted = [greedy_transformers(path, PROMPTS, TOKENS) for path in (*(merged for _, merged in adapters), base)]
    assert wanted[0] != wanted[1] != wanted[2]
    for i, expected in enumerate(wanted):
        assert_same_generation(found[2 * i : 2 * i + 2], expected, BOUND)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "copied"])
def test_a_weight_sync_renews_the_base_under_adapters(base, tmp_path, share):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    context = ps.initialize("torch")
    model = decoder.build_model(ps.read_config(base), context)
    ps.load_checkpoint(model, base, context)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    new = ps.save_checkpoint(model, tmp_path / "new", context, config=ps.read_config(base))
    own, _ = make_adapter(base, tmp_path / "old", 1, TARGETS)
    _, merged = make_adapter(new, tmp_path / "merged", 1, TARGETS)  # the same adapter, on the new weights
    ps.register_model("ServedLora", decoder.build_model)
    parameters = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": p} for p in PROMPTS]
    with engine(base, "ServedLora", enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
        request = LoRARequest("adapter", 1, str(own))
        llm.generate(prompts, parameters, lora_request=request, use_tqdm=False)
        with ps.WeightSync(model, context, llm, share=share) as sync:
            sync()
            adapted = llm.generate(prompts, parameters, lora_request=request, use_tqdm=False)
            plain = llm.generate(prompts, parameters, use_tqdm=False)
    assert_same_generation(generated(adapted), greedy_transformers(merged, PROMPTS, TOKENS), BOUND)
    assert_same_generation(generated(plain), greedy_transformers(new, PROMPTS, TOKENS), BOUND)


def test_lora_on_another_librarys_layers_is_refused(base):
    ps.register_model("ServedTorchLora", decoder.build_model, adapter="torch")
    with (
        pytest.raises(Exception, match=r"LoRA needs vLLM's own layers.*adapter='torch'"),
        engine(base, "ServedTorchLora", enable_lora=True),
    ):
        pass
