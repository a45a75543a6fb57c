"""Training of mixtures of experts over the expert axis equals transformers in one process, in every layout."""

import pytest
import torch
from safetensors.torch import load_file
from support.models.experts import VOCAB, load_reference, save_moe
from support.oracles.transformers_reference import FLOOR, MARGIN, batch, relative_error
from support.workers.experts import RATE, trained
from torch.nn import functional as F

import polyshard as ps
from polyshard.launch.ranks import run_ranks

FSDP = {"data_parallel": "fsdp"}
LAYOUTS = {  # over 4 ranks, by family: library (or with the experts of another one), sizes, and options of the engine
    "qwen3_moe": {
        "experts on each rank": ("torch", {}, {}),
        "expert 2": ("torch", {"expert": 2}, {"recompute": "full"}),
        "expert 4": ("torch", {"expert": 4}, {}),
        "tensor 2, expert 2": ("torch", {"tensor": 2, "expert": 2}, {}),
        "sequence parallel": ("torch", {"tensor": 2, "expert": 2, "sequence_parallel": True}, {}),
        "context 2, expert 2": ("torch", {"context": 2, "expert": 2}, {}),
        "fsdp": ("torch", {}, FSDP),
        "fsdp, expert 2": ("torch", {"expert": 2}, FSDP),
        "megatron": ("megatron", {"tensor": 2}, {"zero_stage": 0}),
        "deepspeed": ("deepspeed", {"tensor": 2}, {"zero_stage": 2}),
        "fairscale": ("fairscale", {"tensor": 2}, {"zero_stage": 1}),
        "megatron, expert 4": ("megatron", {"expert": 4}, {"zero_stage": 0, "recompute": "full"}),
        "megatron, sequence parallel, all-gather": (
            "megatron",
            {"tensor": 2, "expert": 2, "sequence_parallel": True, "token_dispatcher": "allgather"},
            {"zero_stage": 0},
        ),
        "megatron, sequence parallel": (
            "megatron",
            {"tensor": 2, "expert": 2, "sequence_parallel": True},
            {"zero_stage": 0, "recompute": "full"},
        ),
        "megatron, context 2, expert 2": ("megatron", {"context": 2, "expert": 2}, {"zero_stage": 0}),
        "deepspeed, ZeRO 0, expert 4": ("deepspeed", {"expert": 4}, {"zero_stage": 0}),
        "deepspeed, ZeRO 2, tensor 2, expert 2": ("deepspeed", {"tensor": 2, "expert": 2}, {"zero_stage": 2}),
        "fairscale, stage 1, context 2, expert 2": ("fairscale", {"context": 2, "expert": 2}, {"zero_stage": 1}),
        "fairscale, stage 2, expert 4": ("fairscale", {"expert": 4}, {"zero_stage": 2}),
        "torch's experts in megatron": ("megatron+torch", {"tensor": 2, "expert": 2}, {"zero_stage": 0}),
        "deepspeed's experts in torch, fsdp": ("torch+deepspeed", {"expert": 2}, FSDP),
    },
    "deepseek_v3": {"tensor 2, expert 2": ("torch", {"tensor": 2, "expert": 2}, {})},
    "gpt_oss": {
        "tensor 2, expert 2": ("torch", {"tensor": 2, "expert": 2}, {}),
        "fsdp": ("torch", {"expert": 4}, FSDP),
        "deepspeed, ZeRO 1, expert 2": ("deepspeed", {"expert": 2}, {"zero_stage": 1}),
    },
}
SAVES = {
    "torch": ("torch", {"tensor": 2, "expert": 2}, {}),
    "megatron": ("megatron", {"tensor": 2, "expert": 2}, {"zero_stage": 1}),
    "deepspeed": ("deepspeed", {"expert": 2}, {"zero_stage": 2}),
    "fairscale": ("fairscale", {"tensor": 2, "expert": 2}, {"zero_stage": 2}),
}
RESUMES = {  # the saved state, and the layout that continues with it
    **{f"{name} in the same layout": (name, layout) for name, layout in SAVES.items()},
    "torch, expert 4": ("torch", ("torch", {"expert": 4}, {})),
    "torch, fsdp, each expert on one rank": ("torch", ("torch", {"expert": 4}, FSDP)),
    "fairscale from megatron": ("megatron", ("fairscale", {"expert": 4}, {"zero_stage": 1})),
    "torch, fsdp, from fairscale": ("fairscale", ("torch", {"expert": 2}, FSDP)),
    "megatron from deepspeed": ("deepspeed", ("megatron", {"expert": 4}, {"zero_stage": 1})),
    "deepspeed from torch": ("torch", ("deepspeed", {"tensor": 2, "expert": 2}, {"zero_stage": 1})),
}
REFUSED = {  # library, sizes, dtype of the model, options of the engine, and the error
    "deepspeed, ZeRO 3": ("deepspeed", {"expert": 2}, torch.float32, {"zero_stage": 3}, "shard every expert over all"),
    "megatron, float16": ("megatron", {"expert": 2}, torch.float16, {}, "have separate loss scales"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory, results = (tmp_path_factory.mktemp(name) for name in ("models", "results"))
    for kind in LAYOUTS:
        save_moe(directory / kind, kind)
    rows = batch(vocab=VOCAB, rows=4, length=16)
    refused = {name: tuple(case) for name, (*case, _) in REFUSED.items()}
    found = run_ranks(trained, 4, directory, results, rows, LAYOUTS, SAVES, RESUMES, refused, timeout=240)
    references = {
        kind: (step(directory / kind, rows, torch.float64), step(directory / kind, rows, torch.float32))
        for kind in LAYOUTS
    }
    return results, found, references, load_file(directory / "deepseek_v3" / "model.safetensors")


def step(directory, rows, dtype):
    """One step of SGD: loss, gradient norm, update of every tensor, and the norms of experts and of other tensors."""
    model = load_reference(directory, dtype)
    logits = model(rows[0]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), rows[1].flatten())
    loss.backward()
    gradients = {True: [], False: []}
    for name, parameter in model.named_parameters():
        gradients[".experts." in name].append(parameter.grad)
    of_experts, of_others = (torch.nn.utils.get_total_norm(gradients[found]).item() for found in (True, False))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    model.save_pretrained(place := directory.with_name(f"{directory.name}-{dtype}"))
    return loss.item(), norm.item(), load_file(place / "model.safetensors"), of_experts, of_others


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, found in LAYOUTS.items() for name in found])
def test_step_equals_transformers(runs, kind, name):
    results, found, ((loss, norm, exact, *_), (_, _, rounded, *_)) = runs[0], runs[1], runs[2][kind]
    weights = load_file(results / kind / name / "model.safetensors")
    assert set(weights) == set(exact)
    for rank in found:
        assert rank[kind][name] == (pytest.approx(loss, rel=1e-6), pytest.approx(norm, rel=1e-6))
    trained_names = [n for n in exact if "correction_bias" not in n]
    worst = max(relative_error(rounded[n], exact[n]) for n in trained_names)
    for n in trained_names:
        assert relative_error(weights[n], exact[n]) < MARGIN * worst + FLOOR, n


@pytest.mark.parametrize("name", SAVES)
def test_training_resumes_with_the_same_bits(runs, name):
    straight, same = (runs[0] / "resumed" / run / "model.safetensors" for run in (name, f"{name} in the same layout"))
    assert straight.read_bytes() == same.read_bytes()


@pytest.mark.parametrize("name", [name for name in RESUMES if "same layout" not in name])
def test_training_resumes_in_another_layout_and_library(runs, name):
    results, start = runs[0] / "resumed", runs[3]
    straight, other = (load_file(results / n / "model.safetensors") for n in (RESUMES[name][0], name))
    assert set(straight) == set(other)
    for n, weight in straight.items():
        # Adam divides small gradients by small numbers, so single elements differ more than their rounding.
        assert (other[n] - weight).norm() < 1e-3 * (weight - start[n]).norm(), n


@pytest.mark.parametrize("library", SAVES)
@pytest.mark.parametrize("frozen_experts", [True, False])
def test_frozen_parameters_keep_their_weights(runs, library, frozen_experts):
    *_, of_experts, of_others = runs[2]["qwen3_moe"][0]
    norm = of_others if frozen_experts else of_experts
    for rank in runs[1]:
        assert rank["frozen"][library, frozen_experts] == (True, pytest.approx(norm, rel=1e-6))


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_library_cannot_train_is_refused(runs, name):
    for rank in runs[1]:
        assert REFUSED[name][-1] in rank["refused"][name]


def test_unknown_token_dispatchers_are_refused():
    with pytest.raises(ps.ConfigurationError, match="got 'flex', expected 'alltoall' or 'allgather'"):
        ps.initialize("megatron", token_dispatcher="flex")
