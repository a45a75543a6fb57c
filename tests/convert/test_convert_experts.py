"""Checkpoints of mixtures of experts that Megatron-Core and DeepSpeed wrote, into Hugging Face directories.

The oracle is each library's own model: transformers' logits of the converted files are those of the library.
"""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.models.tiny import tiny_model
from support.oracles.expert_checkpoints import (
    EXPERTS,
    YARN,
    expert_config,
    save_deepspeed_experts,
    save_megatron_experts,
    transformers_logits,
)

import polyshard as ps
from polyshard.adapters.megatron.dist_format import _weights
from polyshard.adapters.megatron.expert_names import local_expert
from polyshard.adapters.megatron.names import to_hugging_face
from polyshard.config.decoder_spec import DecoderSpec
from polyshard.convert import convert
from polyshard.convert.format import Options
from polyshard.testing import run_ranks
from polyshard.weights.lazy_tensor import LazyTensor

CLOSE = {"rtol": 0, "atol": 2e-5}


def allowed(family, **changes):
    return Options(config=expert_config(family, **changes), allow_pickle=True)


# Cases of the checkpoints: what the configuration has beside `expert_config`'s fields.
CHANGES = {"dots1": {"n_group": 2, "topk_group": 1}, "qwen2_moe": {"norm_topk_prob": False}}
CHANGES["deepseek_v3"] = {
    **{"n_group": 2, "topk_group": 1},
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN},
}
GROUPED = {"moe_grouped_gemm": True}


def assert_converted(folder, case, logits, changes=None):
    """Convert both kinds of checkpoint, compare logits, and return the last conversion."""
    for kind in ("dist", "legacy"):
        options, target = allowed(case, **(changes or CHANGES.get(case, {}))), folder / f"hf-{case}-{kind}"
        done = convert(folder / case / kind, target, options=options)
        torch.testing.assert_close(transformers_logits(target), logits[case], **CLOSE)
    return done


def test_megatron_with_expert_parallel_to_hugging_face(tmp_path):
    """Of two expert ranks: `torch_dist`, `mp_rank_TT_EEE`, and with two pipeline stages `mp_rank_TT_PPP_EEE`."""
    cases = {"mixtral": ("mixtral", {}), "glm4_moe": ("glm4_moe", {}), "dots1": ("dots1", GROUPED)}
    cases["deepseek_v3"] = ("deepseek_v3", {})
    logits = run_ranks(save_megatron_experts, 2, tmp_path, 1, 2, cases)[0]
    for case in cases:
        notes = assert_converted(tmp_path, case, logits).notes
        assert any("e_score_correction_bias is written as zeros" in n for n in notes) == (case == "dots1")
    legacy = tmp_path / "mixtral" / "legacy" / "iter_0000003"
    other_epsilon = allowed("deepseek_v3", **CHANGES["deepseek_v3"], rms_norm_eps=1e-5)
    bare = files_of(tmp_path / "deepseek_v3")
    for state in bare:
        del state["args"]
    save_files(tmp_path / "bare", bare)
    done = convert(tmp_path / "bare", tmp_path / "hf-bare", options=other_epsilon)
    assert any("the norms of latents add 1e-05 in Megatron and 1e-06 in transformers" in note for note in done.notes)
    files = files_of(legacy)
    save_stages(tmp_path / "stages", files)
    convert(tmp_path / "stages", tmp_path / "hf-stages", options=allowed("mixtral"))
    torch.testing.assert_close(transformers_logits(tmp_path / "hf-stages"), logits["mixtral"], **CLOSE)
    # A correction bias that is rounded chooses other experts.
    done = convert(
        tmp_path / "glm4_moe" / "dist",
        tmp_path / "bf16",
        options=allowed("glm4_moe"),
        dtype=torch.bfloat16,
        verify=True,
    )
    assert "Megatron-Core's GPTModel" in done.compared[-1], done.not_compared
    assert "kept the dtype of 1 correction biases of routers" in done.notes
    found = load_file(tmp_path / "bf16" / "model.safetensors")
    assert {n for n, v in found.items() if v.dtype == torch.float32} == {
        "model.layers.1.mlp.gate.e_score_correction_bias"
    }

    contradictions = {
        r"num_experts: the checkpoint's arguments say 4, the configuration 8": {"num_local_experts": 2 * EXPERTS},
        r"moe_router_topk: the checkpoint's arguments say 2, the configuration 1": {"num_experts_per_tok": 1},
        r"moe_ffn_hidden_size: the checkpoint's arguments say 48, the configuration 96": {"intermediate_size": 96},
    }
    for message, changes in contradictions.items():
        with pytest.raises(ps.CheckpointError, match=message):
            convert(tmp_path / "mixtral" / "dist", tmp_path / "no", options=allowed("mixtral", **changes))
    for case, changes, arguments, message in ROUTERS:
        stored = files_of(tmp_path / case) if case in cases else files
        save_legacy(tmp_path / message, stored, **arguments)
        with pytest.raises(ps.CheckpointError, match=re.escape(message)):
            convert(tmp_path / message, tmp_path / "no", options=allowed(case, **changes))
    for state in files:
        state["model"]["decoder.layers.1.mlp.router.local_tokens_per_expert"] = torch.rand(EXPERTS)
    save_legacy(tmp_path / "capacity", files, moe_expert_capacity_factor=1.0)
    done = convert(tmp_path / "capacity", tmp_path / "hf-capacity", options=allowed("mixtral"))
    assert any("left out moe_expert_capacity_factor=1.0" in note for note in done.notes)
    assert any("left out the training state" in note and "routers' counts of tokens" in note for note in done.notes)

    files[1]["model"]["decoder.layers.1.mlp.router.weight"] += 1
    save_legacy(tmp_path / "apart", files)
    with pytest.raises(ps.CheckpointError, match=r"mlp.router.weight is on two stages or expert ranks with different"):
        convert(tmp_path / "apart", tmp_path / "no", options=allowed("mixtral"))
    grouped = files_of(tmp_path / "dots1")
    for state in grouped:
        del state["args"]
    save_files(tmp_path / "fewer", grouped)
    wrong = allowed("dots1", n_routed_experts=10)
    with pytest.raises(ps.CheckpointError, match=r"experts.weight1 does not fit .* \[64, 192\] .* expected 10 experts"):
        convert(tmp_path / "fewer", tmp_path / "no", options=wrong)
    shutil.rmtree(legacy / "mp_rank_00_001")
    with pytest.raises(ps.CheckpointError, match="expert_model_parallel_size=2, got 1 ranks"):
        convert(tmp_path / "mixtral" / "legacy", tmp_path / "no", options=allowed("mixtral"))


_LATENT = CHANGES["deepseek_v3"]
_ROPE = _LATENT["rope_parameters"]

# Family, changes of the configuration, arguments of the checkpoint, and the error.
ROUTERS = [
    (
        *("mixtral", {}, {"moe_router_score_function": "sigmoid"}),
        "moe_router_score_function: the checkpoint's arguments say 'sigmoid', the configuration 'softmax'",
    ),
    (
        *("mixtral", {}, {"moe_shared_expert_intermediate_size": 48}),
        "moe_shared_expert_intermediate_size: the checkpoint's arguments say 48, the configuration None",
    ),
    (
        *("mixtral", {}, {"moe_router_load_balancing_type": ["sinkhorn"]}),
        "moe_router_load_balancing_type: the configuration's model has no sinkhorn router",
    ),
    (
        *("qwen3_moe", {"norm_topk_prob": False}, {}),
        "moe_router_pre_softmax: the checkpoint's arguments say False, the configuration True",
    ),
    (
        *("glm4_moe", {"routed_scaling_factor": 1.0}, {}),
        "moe_router_topk_scaling_factor: the checkpoint's arguments say 2.5, the configuration None",
    ),
    (
        *("glm4_moe", {"norm_topk_prob": False}, {}),
        "norm_topk_prob: Megatron divides the weights by their sum",
    ),
    (
        *("glm4_moe", {}, {"moe_latent_size": 8}),
        "its arguments say moe_latent_size=8",
    ),
    (
        *("dots1", {}, {}),
        "moe_router_num_groups: the checkpoint's arguments say 2, the configuration None",
    ),
    (
        *("dots1", {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 1}, {"moe_router_topk": 1}),
        "topk_group: Megatron ranks groups by the sum of their 1 best experts",
    ),
    (
        *("deepseek_v3", {**_LATENT, "kv_lora_rank": 21}, {}),
        "kv_lora_rank: the checkpoint's arguments say 20, the configuration 21",
    ),
    (
        *("deepseek_v3", _LATENT, {"mscale": 0.9}),
        "mscale: the checkpoint's arguments say 0.9, the configuration 0.7",
    ),
    (
        *("deepseek_v3", {**_LATENT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, {}),
        "rotary scaling: the checkpoint's arguments say yarn by 4.0, the configuration default",
    ),
    (
        *("deepseek_v3", _LATENT, {"multi_latent_attention": False}),
        "multi_latent_attention: the checkpoint's arguments say False, the configuration True",
    ),
    (
        *("deepseek_v3", {**_LATENT, "rope_interleave": False}, {}),
        "rope_interleave=false: Megatron's latent attention rotates neighbouring channels",
    ),
    (
        *("deepseek_v3", {**_LATENT, "rope_parameters": {**_ROPE, "attention_factor": 2.0}}, {}),
        "Megatron's latent attention has none",
    ),
    (
        *("mixtral", {}, {"multi_latent_attention": True}),
        "its arguments say multi_latent_attention=True",
    ),
]


def files_of(place):
    """Return the contents of the legacy files of two expert ranks."""
    place = place if place.name.startswith("iter") else place / "legacy" / "iter_0000003"
    return [torch.load(place / f"mp_rank_00_{e:03d}" / "model_optim_rng.pt", weights_only=False) for e in range(2)]


def save_files(folder, files):
    """Save the contents of expert ranks."""
    for expert, content in enumerate(files):
        place = folder / f"mp_rank_00_{expert:03d}"
        place.mkdir(parents=True)
        torch.save(content, place / "model_optim_rng.pt")


def save_legacy(folder, files, **arguments):
    """Save the files of expert ranks with further arguments."""
    said = (type(content["args"])(**{**vars(content["args"]), **arguments}) for content in files)
    save_files(folder, [{**content, "args": args} for content, args in zip(files, said, strict=True)])


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
    without_yarn = {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0, "q_lora_rank": None}
    cases = {"qwen3_moe": ("qwen3_moe", {}), "qwen2_moe": ("qwen2_moe", GROUPED)}
    cases["deepseek_v3"] = ("deepseek_v3", without_yarn)
    changes = {"deepseek_v3": {"n_group": 2, "topk_group": 1, "q_lora_rank": None}}
    logits = run_ranks(save_megatron_experts, 2, tmp_path, 2, 1, cases)[0]
    for case in cases:
        assert_converted(tmp_path, case, logits, changes.get(case))


def test_names_of_megatrons_grouped_experts():
    """TEGroupedMLP needs Transformer Engine, which does not run on a CPU."""
    assert local_expert("mlp.experts.linear_fc2.weight13") == (13, "linear_fc2.weight")
    assert local_expert("mlp.experts.local_experts.3.linear_fc1.weight") == (3, "linear_fc1.weight")
    assert local_expert("mlp.shared_experts.linear_fc1.weight") is None


# The others have what these three have together: stacked layers, shared experts with a gate, layers of two kinds.
WRITTEN = (
    *("mixtral", "qwen2_moe", "deepseek_v3"),
    *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen3_moe", "dots1", "glm4_moe")),
)


def save_hugging_face(directory, family, **changes):
    fields = expert_config(family, **{**CHANGES.get(family, {}), **changes})
    fields.pop("model_type")
    config = transformers.AutoConfig.for_model(family, **fields)
    config._experts_implementation = "eager"
    tiny_model(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", WRITTEN)
def test_hugging_face_with_experts_to_megatron_and_back(tmp_path, family):
    """Megatron's own GPT, loaded by its own code, has transformers' logits."""
    source = save_hugging_face(tmp_path / "hf", family)
    done = convert(source, tmp_path / "megatron", to_format="megatron-torch-dist", verify=True)
    assert "Megatron-Core's GPTModel" in done.compared[-1], done.not_compared
    assert done.logits < 1e-5
    convert(tmp_path / "megatron", tmp_path / "back", options=Options(allow_pickle=True))
    stored, back = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert set(stored) == set(back)
    assert all(torch.equal(stored[name], back[name]) for name in stored)


def test_what_megatron_cannot_express_of_experts_is_refused_and_what_is_left_out_is_said(tmp_path):
    alone = save_hugging_face(tmp_path / "alone", "dots1", norm_topk_prob=False)
    with pytest.raises(ps.CheckpointError, match="cannot express this model: got norm_topk_prob: Megatron divides"):
        convert(alone, tmp_path / "no", to_format="megatron-torch-dist")
    interleaved = save_hugging_face(tmp_path / "halves", "deepseek_v3", rope_interleave=False)
    with pytest.raises(ps.CheckpointError, match="rope_interleave=false: Megatron's latent attention rotates neighbo"):
        convert(interleaved, tmp_path / "no", to_format="megatron-torch-dist")
    with pytest.raises(ps.CheckpointError, match="model_type is unsupported: got 'dots1'"):
        convert(alone, tmp_path / "no", to_format="llama")

    source = save_hugging_face(tmp_path / "predicting", "glm4_moe")
    tensors = load_file(source / "model.safetensors")
    tensors |= {"model.layers.2.eh_proj.weight": torch.ones(64, 128), "model.layers.2.enorm.weight": torch.ones(64)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    done = convert(source, tmp_path / "megatron", to_format="megatron-torch-dist")
    assert any("left out 2 tensors of multi-token prediction: model.layers.2.eh_proj" in note for note in done.notes)
    tensors["model.layers.3.enorm.weight"] = torch.ones(64)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ps.CheckpointError, match=r"model\.layers\.3\.enorm\.weight"):
        convert(source, tmp_path / "no", to_format="megatron-torch-dist")


def test_a_norm_that_has_two_values_under_two_names_is_refused(tmp_path):
    """It is written under the names that it has on both kinds of Megatron's layers."""
    source, target = save_hugging_face(tmp_path / "hf", "mixtral"), tmp_path / "megatron"
    convert(source, target, to_format="megatron-torch-dist")
    held, _ = _weights(target / "iter_0000000", Options(allow_pickle=True))
    spec = DecoderSpec.of(expert_config("mixtral"), experts=True)
    assert to_hugging_face(target, held, spec, None)
    held["decoder.layers.1.pre_mlp_layernorm.weight"] = LazyTensor((64,), torch.float32, lambda: torch.zeros(64))
    with pytest.raises(
        ps.CheckpointError, match=r"pre_mlp_layernorm\.weight differ, expected one norm under two names"
    ):
        to_hugging_face(target, held, spec, None)


def test_deepspeed_with_experts_to_hugging_face(tmp_path):
    runs = [(2, 0, "float32"), (1, 2, "bfloat16"), (2, 2, "autoep")]
    (_, logits), (weights, _), (_, auto_logits) = run_ranks(save_deepspeed_experts, 2, tmp_path, runs)[0]
    convert(tmp_path / "2", tmp_path / "hf-auto", options=allowed("qwen3_moe", norm_topk_prob=False))
    torch.testing.assert_close(transformers_logits(tmp_path / "hf-auto"), auto_logits, **CLOSE)
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

    place = tmp_path / "0" / "step1"
    file, other = (place / f"layer_1_expert_{e}_mp_rank_00_model_states.pt" for e in (2, 3))
    stored, content = torch.load(file), torch.load(other)

    def refused(message):
        with pytest.raises(ps.CheckpointError, match=message):
            convert(tmp_path / "0", tmp_path / "no", options=allowed("qwen3_moe"))

    torch.save(content, file)
    refused(r"layer_1_expert_2.* is not the file of expert 2: got model.layers.1.mlp.*deepspeed_experts.3")
    torch.save({name: value[:40] for name, value in stored.items()}, file)
    refused(r"layers.1.mlp.experts.2.\w+_proj.weight has the wrong shape: got 1 part of \[40, \d+\]")
    twice = place / "layer_0_expert_2_mp_rank_00_model_states.pt"
    before = torch.load(twice)
    torch.save(stored, file)
    torch.save(stored, twice)
    refused(r"holds an expert twice: got model.layers.1.mlp.experts.2.* in layer_1_expert_2.* and in layer_0_expert_2")
    torch.save(before, twice)
    torch.save(content, place / "layer_1_expert_03_mp_rank_00_model_states.pt")
    refused(r"holds an expert twice: got model.layers.1.mlp.experts.3")
    (place / "layer_1_expert_03_mp_rank_00_model_states.pt").unlink()
    torch.save({}, place / "expert_0_mp_rank_00_model_states.pt")
    refused(r"1 files of experts in DeepSpeed's first form, such as expert_0_mp_rank_00_model_states.pt")
    (place / "expert_0_mp_rank_00_model_states.pt").unlink()
    file.unlink()
    refused(r"3 of the model's 45 tensors are missing: .*layers.1.mlp.experts.2")
    with pytest.raises(ps.CheckpointError, match="router has the score sigmoid, expected softmax"):
        convert(tmp_path / "1", tmp_path / "no", options=allowed("glm4_moe"))
    with pytest.raises(ps.CheckpointError, match="got norm_topk_prob=false, expected true"):
        convert(tmp_path / "1", tmp_path / "no", options=allowed("qwen3_moe", norm_topk_prob=False))
    dense = {**expert_config("qwen3_moe"), "model_type": "qwen3"}
    with pytest.raises(ps.CheckpointError, match="holds 8 files of experts, and the configuration has none"):
        convert(tmp_path / "1", tmp_path / "no", options=Options(config=dense, allow_pickle=True))


def test_stacked_experts_of_another_number_than_the_configurations_are_refused(tmp_path):
    config = {"model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"], "num_local_experts": 4}
    block = "model.layers.0.block_sparse_moe"
    whole = {f"{block}.input_linear.weight": torch.ones(4, 12, 8), f"{block}.output_linear.weight": torch.ones(4, 8, 6)}
    cases = {
        r"got 3 in .*input_linear.weight, expected 4 by the configuration's num_local_experts=4": {
            **whole,
            f"{block}.input_linear.weight": torch.ones(3, 12, 8),
        },
        r"output_linear.weight is missing beside .*input_linear.weight": {
            f"{block}.input_linear.weight": torch.ones(4, 12, 8)
        },
    }
    for number, (message, tensors) in enumerate(cases.items()):
        (source := tmp_path / str(number)).mkdir()
        (source / "config.json").write_text(json.dumps(config))
        save_file(tensors, source / "model.safetensors")
        with pytest.raises(ps.CheckpointError, match=message):
            convert(source, tmp_path / "no")
