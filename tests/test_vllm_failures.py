"""What cannot be served ends in an error that says so, out of vLLM's own engine start."""

import subprocess
import sys

import decoder
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import broken_factories
from support.engines import engine, greedy
from support.models import save_tiny

import polyshard as ps
from polyshard.registry import ENVIRONMENT_VARIABLE

pytestmark = pytest.mark.vllm


@pytest.fixture
def directory(tmp_path):
    return save_tiny(tmp_path / "model", "llama", hidden_size=64, head_dim=32)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            broken_factories.raises,
            r"its factory support.broken_factories:raises raised ZeroDivisionError: the user's bug",
        ),
        (broken_factories.gives_none, "returned None; does it lack a return"),
        (broken_factories.gives_a_dict, "returned dict, expected a torch.nn.Module"),
        (
            broken_factories.lacks_compute_logits,
            r"lacks a method compute_logits\(hidden_states\); a served model needs",
        ),
        (broken_factories.wrong_forward, r"lacks a forward that takes \(input_ids, positions\)"),
    ],
)
def test_a_factory_that_will_not_do(directory, factory, message):
    ps.register_model("Broken", factory)
    with pytest.raises(ps.RegistrationError, match=message), engine(directory, "Broken"):
        pass


@pytest.mark.parametrize("adapter", ["vllm", "torch"])
def test_a_checkpoint_that_does_not_fit(directory, adapter):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(3)
    tensors["model.stray"] = torch.ones(3)
    save_file(tensors, path, metadata={"format": "pt"})
    ps.register_model("Unfit", decoder.build_model, adapter=adapter)
    with pytest.raises(ps.CheckpointError) as caught, engine(directory, "Unfit"):
        pass
    for part in (
        "missing model.layers.0.mlp.up_proj.weight",
        "model.norm.weight is [3], the model has [64]",
        "unexpected model.stray",
    ):
        assert part in str(caught.value)


def test_a_head_dimension_that_vllm_does_not_have(tmp_path):
    directory = save_tiny(tmp_path / "model", "llama", hidden_size=48, head_dim=520)
    ps.register_model("LargeHeads", decoder.build_model)
    with pytest.raises(Exception, match=r"(?i)head.*(size|dim).*520"), engine(directory, "LargeHeads"):
        pass


def test_a_reference_that_cannot_be_imported_is_named_by_vllm_itself(directory, monkeypatch):
    """vLLM swallows a plugin's ImportError and would go on to 'unknown architecture'."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, '{"Gone": "nowhere.at.all:build"}')
    code = f"from vllm import LLM; LLM({str(directory)!r}, hf_overrides={{'architectures': ['Gone']}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert (
        "RegistrationError: 'nowhere.at.all:build': importing 'nowhere.at.all' raised ModuleNotFoundError"
        in done.stderr
    )


def test_embeddings_as_prompts(directory):
    ps.register_model("Embeddings", decoder.build_model)
    from vllm import SamplingParams

    with engine(directory, "Embeddings", enable_prompt_embeds=True) as llm:
        ids = [5, 9, 2, 40]
        want = greedy(llm, [ids], 6)[0][0]
        table = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
        prompt = {"prompt_embeds": table[torch.tensor(ids)]}
        output = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True), use_tqdm=False)
        assert list(output[0].outputs[0].token_ids) == want
