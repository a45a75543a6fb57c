"""The files in which DeepSpeed's layers store experts: `layer_L_expert_E_mp_rank_TT_model_states.pt`.

L counts the layers that have experts, E the experts over all ranks. Routers are in the files of the other weights. The
layers are those of `deepspeed.moe.layer.MoE` in a decoder that otherwise has Hugging Face's names, or those that AutoEP
(`expert_parallel` in the configuration of DeepSpeed) puts into a model of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from polyshard.config.decoder_spec import DecoderSpec
from polyshard.config.expert_spec import ExpertSpec
from polyshard.convert.format import Options
from polyshard.convert.pickles import load_pickle
from polyshard.core.errors import CheckpointError

FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d\d)_model_states\.pt$")
_NAME = re.compile(r"(?P<prefix>.*?)model\.layers\.(?P<layer>\d+)\.(?:[\w]+\.)*?deepspeed_moe\.(?P<rest>.+)$")
_EXPERT = re.compile(r"experts\.deepspeed_experts\.(\d+)\.(\w+)\.weight$")
_AUTO = re.compile(
    r"(?P<prefix>.*?)model\.layers\.(?P<layer>\d+)\.\w+\."
    r"(?:experts\.(?P<part>w[123])\.(?P<expert>\d+)|(?P<router>router|gate)\.gate\.weight)$"
)
_PARTS = {"gate_proj": 0, "up_proj": 1, "down_proj": 2, "w1": 0, "w3": 1, "w2": 2}

PRECISION_NOTE = (
    "the weights are those that the model computes with: DeepSpeed's zero_to_fp32 does not read checkpoints with "
    "experts, so copies in fp32 are left out"
)
ROUTING_NOTE = (
    "DeepSpeed stores neither the number of experts for each token nor a capacity: num_experts_per_tok is that of the "
    "configuration, unchecked, and the target drops no tokens"
)


def expert_files(place: Path) -> list[Path]:
    """Return the files of experts, sorted by name."""
    return sorted(file for file in place.glob("layer_*_model_states.pt") if FILE.match(file.name))


def with_experts(
    place: Path, modules: Sequence[Mapping[str, torch.Tensor]], spec: DecoderSpec, options: Options
) -> list[Mapping[str, torch.Tensor]]:
    """Return each tensor rank's weights and experts, under the configuration's Hugging Face names.

    Args:
        place: the directory with the files.
        modules: each tensor rank's other weights.
        spec: the decoder spec of the model.
        options: the user's settings.

    Raises:
        CheckpointError: the configuration has no experts or another router, or a file is of no known tensor rank.
    """
    files, experts = expert_files(place), spec.experts
    if experts is None:
        raise CheckpointError(
            f"{place} holds {len(files)} files of experts, and the configuration has none: got "
            f"model_type={spec.family!r}. Pass --config of a model with experts."
        )
    native = any("deepspeed_moe." in name for module in modules for name in module)  # AutoEP routes as transformers
    if experts.score != "softmax":
        raise CheckpointError(
            f"{place} is of another model than the configuration: got model_type={spec.family!r}, whose router has "
            f"the score {experts.score}, expected softmax."
        )
    if native and experts.top_k > 1 and not experts.normalized:
        raise CheckpointError(
            f"{place} is of another model than the configuration: got norm_topk_prob=false, expected true, because "
            "DeepSpeed divides the weights of two or more experts by their sum."
        )
    ranks = [_renamed(place, module, experts) for module in modules]
    sources: list[dict[str, str]] = [{} for _ in ranks]
    for file in files:
        match = FILE.match(file.name)
        rank, number = (int(match[3]), int(match[2])) if match else (0, 0)
        if rank >= len(ranks):
            raise CheckpointError(f"{place} is incomplete: the file of tensor rank {rank} is missing. Copy all ranks.")
        content = {n: value for n, value in load_pickle(file, options).items() if isinstance(value, torch.Tensor)}
        strangers = sorted(name for name in content if _number(name) != number)
        if strangers or not content:
            held = strangers[0] if strangers else "no tensors"
            raise CheckpointError(f"{file} is not the file of expert {number}: got {held}. Copy the checkpoint again.")
        for name, value in content.items():
            own = _hugging_face(name, experts)
            if own in ranks[rank]:
                raise CheckpointError(
                    f"{place} holds an expert twice: got {own} in {file.name} and in "
                    f"{sources[rank].get(own, 'the file of the other weights')}. Copy the checkpoint again."
                )
            ranks[rank][own], sources[rank][own] = value, file.name
    return list(ranks)


def _renamed(place: Path, module: Mapping[str, torch.Tensor], experts: ExpertSpec) -> dict[str, torch.Tensor]:
    """Return the weights that are not experts under Hugging Face's names; AutoEP stores a router under two names.

    Raises:
        CheckpointError: the two have different values.
    """
    found: dict[str, torch.Tensor] = {}
    for name, value in module.items():
        own = _hugging_face(name, experts)
        if own in found and not torch.equal(found[own], value):
            raise CheckpointError(
                f"{place} holds {own} twice with different values: got a difference in {name}, expected equal ones. "
                "Find out which is right."
            )
        found[own] = value
    return found


def _number(name: str) -> int | None:
    """Return the number of the expert that a tensor belongs to; None for other tensors."""
    for pattern in (_NAME, _AUTO):
        match = pattern.match(name)
        inner = _EXPERT.match(match["rest"]) if match and pattern is _NAME else None
        if inner is not None:
            return int(inner[1])
        if match and pattern is _AUTO and match["expert"]:
            return int(match["expert"])
    return None


def _hugging_face(name: str, experts: ExpertSpec) -> str:
    """Return Hugging Face's name of a router or an expert; all other names are returned as they are."""
    if auto := _AUTO.match(name):
        layer = int(auto["layer"])
        if auto["router"]:
            return auto["prefix"] + experts.router(layer)
        return auto["prefix"] + experts.projection(layer, int(auto["expert"]), _PARTS[auto["part"]])
    match = _NAME.match(name)
    if match is None:
        return name
    layer = int(match["layer"])
    if match["rest"] == "gate.wg.weight":
        return match["prefix"] + experts.router(layer)
    expert = _EXPERT.match(match["rest"])
    if expert is None or expert[2] not in _PARTS:
        return name
    return match["prefix"] + experts.projection(layer, int(expert[1]), _PARTS[expert[2]])
