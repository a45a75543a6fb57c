"""Checkpoints of mixtures of experts that Megatron-Core and DeepSpeed wrote, into Hugging Face directories.

The oracle is each library's own model: transformers' logits of the converted files are those of the library.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.oracles.expert_checkpoints import (
    EXPERTS,
    expert_config,
    save_deepspeed_experts,
    save_megatron_experts,
    transformers_logits,
)

import polyshard as ps
from polyshard.adapters.megatron.expert_names import local_expert
from polyshard.convert import convert
from polyshard.convert.format import Options
from polyshard.testing import run_ranks

CLOSE = {"rtol": 0, "atol": 2e-5}


def allowed(family, **changes):
    return Options(config=expert_config(family, **changes), allow_pickle=True)


def test_megatron_with_expert_parallel_to_hugging_face(tmp_path):
    """Of two expert ranks: `torch_dist`, `mp_rank_TT_EEE`, and with two pipeline stages `mp_rank_TT_PPP_EEE`."""
    logits = run_ranks(save_megatron_experts, 2, tmp_path, 1, 2, "mixtral", {})[0]
    legacy = tmp_path / "legacy" / "iter_0000003"
    files = [torch.load(legacy / f"mp_rank_00_{e:03d}" / "model_optim_rng.pt", weights_only=False) for e in range(2)]
    save_stages(tmp_path / "stages", files)
    for kind in ("dist", "legacy", "stages"):
        done = convert(tmp_path / kind, tmp_path / f"hf-{kind}", options=allowed("mixtral"), verify=kind == "dist")
        assert kind != "dist" or "Megatron-Core's GPTModel" in done.compared[-1], done.not_compared
        torch.testing.assert_close(transformers_logits(tmp_path / f"hf-{kind}"), logits, **CLOSE)

    contradictions = {
        r"num_experts: the checkpoint's arguments say 4, the configuration 8": {"num_local_experts": 2 * EXPERTS},
        r"moe_router_topk: the checkpoint's arguments say 2, the configuration 1": {"num_experts_per_tok": 1},
        r"moe_ffn_hidden_size: the checkpoint's arguments say 48, the configuration 96": {"intermediate_size": 96},
    }
    for message, changes in contradictions.items():
        with pytest.raises(ps.CheckpointError, match=message):
            convert(tmp_path / "dist", tmp_path / "no", options=allowed("mixtral", **changes))
    unnormalized = allowed("qwen3_moe", norm_topk_prob=False)
    with pytest.raises(ps.CheckpointError, match="moe_router_pre_softmax: the checkpoint's arguments say False"):
        convert(tmp_path / "dist", tmp_path / "no", options=unnormalized)
    for name, value in {"moe_router_score_function": "sigmoid", "moe_shared_expert_intermediate_size": 48}.items():
        save_legacy(tmp_path / name, files, **{name: value})
        with pytest.raises(ps.CheckpointError, match=f"unsupported model: its arguments say {name}={value!r}"):
            convert(tmp_path / name, tmp_path / "no", options=allowed("mixtral"))
    save_legacy(tmp_path / "capacity", files, moe_expert_capacity_factor=1.0)
    done = convert(tmp_path / "capacity", tmp_path / "hf-capacity", options=allowed("mixtral"))
    assert any("left out moe_expert_capacity_factor=1.0" in note for note in done.notes)

    files[1]["model"]["decoder.layers.1.mlp.router.weight"] += 1
    save_legacy(tmp_path / "apart", files)
    with pytest.raises(ps.CheckpointError, match=r"mlp.router.weight is on two stages or expert ranks with different"):
        convert(tmp_path / "apart", tmp_path / "no", options=allowed("mixtral"))
    shutil.rmtree(legacy / "mp_rank_00_001")
    with pytest.raises(ps.CheckpointError, match="expert_model_parallel_size=2, got 1 ranks"):
        convert(tmp_path / "legacy", tmp_path / "no", options=allowed("mixtral"))


def save_legacy(folder, files, **arguments):
    """Save the files of expert ranks with further arguments."""
    for expert, content in enumerate(files):
        place = folder / f"mp_rank_00_{expert:03d}"
        place.mkdir(parents=True)
        said = type(content["args"])(**{**vars(content["args"]), **arguments})
        torch.save({**content, "args": said}, place / "model_optim_rng.pt")


def save_stages(folder, files):
    """Save the files of expert ranks with their two layers on two pipeline stages."""
    for expert, content in enumerate(files):
        for stage in range(2):
            own, before = f"decoder.layers.{stage}.", "decoder.layers.0."
            ends = ("embedding",) if stage == 0 else ("decoder.final", "output")
            part = {n: v for n, v in content["model"].items() if n.startswith(ends)}
            part |= {n.replace(own, before): v for n, v in content["model"].items() if n.startswith(own)}
            place = folder / f"mp_rank_00_{stage:03d}_{expert:03d}"
            place.mkdir(parents=True)
            torch.save({"model": part, "iteration": 3}, place / "model_optim_rng.pt")


def test_megatron_with_experts_on_two_tensor_ranks_to_hugging_face(tmp_path):
    logits = run_ranks(save_megatron_experts, 2, tmp_path, 2, 1, "qwen3_moe", {})[0]
    for kind in ("dist", "legacy"):
        convert(tmp_path / kind, tmp_path / f"hf-{kind}", options=allowed("qwen3_moe"))
        torch.testing.assert_close(transformers_logits(tmp_path / f"hf-{kind}"), logits, **CLOSE)


def test_names_of_megatrons_grouped_experts():
    """TEGroupedMLP needs Transformer Engine, and GroupedMLP grouped_gemm: neither runs on a CPU."""
    assert local_expert("mlp.experts.linear_fc2.weight13") == (13, "linear_fc2.weight")
    assert local_expert("mlp.experts.local_experts.3.linear_fc1.weight") == (3, "linear_fc1.weight")
    assert local_expert("mlp.shared_experts.linear_fc1.weight") is None
    with pytest.raises(ps.CheckpointError, match=r"is of Megatron's GroupedMLP, which is unsupported"):
        local_expert("mlp.experts.weight1")


def test_deepspeed_with_experts_to_hugging_face(tmp_path):
    runs = [(2, 0, "float32"), (1, 2, "bfloat16")]
    (_, logits), (weights, _) = run_ranks(save_deepspeed_experts, 2, tmp_path, runs)[0]
    exact = convert(tmp_path / "0", tmp_path / "hf", options=allowed("qwen3_moe"))
    torch.testing.assert_close(transformers_logits(tmp_path / "hf"), logits, **CLOSE)
    assert any("num_experts_per_tok is that of the configuration, unchecked" in note for note in exact.notes)
    rounded = convert(tmp_path / "1", tmp_path / "hf-bf16", options=allowed("qwen3_moe"))
    assert any("copies in fp32 are left out" in note for note in rounded.notes)
    assert not any("copies in fp32 are left out" in note for note in exact.notes)
    found = load_file(tmp_path / "hf-bf16" / "model.safetensors")
    experts = "mlp.deepspeed_moe.experts.deepspeed_experts."
    theirs = {name.replace(experts, "mlp.experts."): value for name, value in weights.items()}
    theirs = {name.replace("mlp.deepspeed_moe.gate.wg.", "mlp.gate."): value for name, value in theirs.items()}
    assert set(found) == set(theirs)
    assert all(torch.equal(found[name], theirs[name].to(found[name].dtype)) for name in found)

    (tmp_path / "0" / "step1" / "layer_1_expert_2_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(ps.CheckpointError, match=r"3 of the model's 45 tensors are missing: .*layers.1.mlp.experts.2"):
        convert(tmp_path / "0", tmp_path / "no", options=allowed("qwen3_moe"))
    with pytest.raises(ps.CheckpointError, match="got norm_topk_prob=false, expected true"):
        convert(tmp_path / "1", tmp_path / "no", options=allowed("qwen3_moe", norm_topk_prob=False))
    dense = {**expert_config("qwen3_moe"), "model_type": "qwen3"}
    with pytest.raises(ps.CheckpointError, match="holds 8 files of experts, and the configuration has none"):
        convert(tmp_path / "1", tmp_path / "no", options=Options(config=dense, allow_pickle=True))
