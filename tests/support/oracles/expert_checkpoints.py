"""Checkpoints of mixtures of experts, written by the libraries' own save code, and their own models' logits."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers

import polyshard as ps
from polyshard.adapters.megatron.latent_compat import with_local_attention
from support.models.tiny import tiny_config, tiny_model
from support.oracles.library_checkpoints import IDS, SIZES, megatron_on_cpu, megatron_settings

EXPERTS, TOP_K, WIDTH = 4, 2, 48
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.9}


def expert_config(family: str, **changes: Any) -> dict[str, Any]:
    """Return the fields of the config.json of a small model with experts."""
    sizes = {**SIZES, "num_experts_per_tok": TOP_K, "tie_word_embeddings": False}
    if family == "mixtral":
        sizes |= {"num_local_experts": EXPERTS, "intermediate_size": WIDTH, "rope_theta": 10000.0}
    else:
        sizes |= {"moe_intermediate_size": WIDTH, "norm_topk_prob": True, "head_dim": 16}
    if family == "deepseek_v3":
        del sizes["head_dim"]
        sizes |= LATENT | {"num_key_value_heads": SIZES["num_attention_heads"], "rms_norm_eps": 1e-6}
    if family in ("deepseek_v3", "dots1", "glm4_moe"):
        sizes |= {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1}
        sizes |= {"routed_scaling_factor": 2.5}
    elif family != "mixtral":
        sizes["num_experts" if family == "qwen2_moe" else "num_local_experts"] = EXPERTS
    if family == "qwen2_moe":
        sizes["shared_expert_intermediate_size"] = 2 * WIDTH
    return transformers.AutoConfig.for_model(family, **{**sizes, **changes}).to_dict()


_SHARED = {"moe_shared_expert_intermediate_size": WIDTH, "moe_layer_freq": [0, 1]}
_SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5}

# Megatron's settings of each family, beside the sizes.
MEGATRON: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {
        **{"add_qkv_bias": True, "moe_router_pre_softmax": True},
        **{"moe_shared_expert_intermediate_size": 2 * WIDTH, "moe_shared_expert_gate": True},
    },
    "qwen3_moe": {"qk_layernorm": True},
    "dots1": {**_SHARED, **_SIGMOID, "qk_layernorm": True, "moe_router_num_groups": 2, "moe_router_group_topk": 1},
    "glm4_moe": {**_SHARED, **_SIGMOID, "moe_router_enable_expert_bias": True},
    "deepseek_v3": {
        **{**_SHARED, **_SIGMOID, "moe_router_enable_expert_bias": True, "qk_layernorm": True},
        **{"moe_router_num_groups": 2, "moe_router_group_topk": 1, "multi_latent_attention": True},
        **{"q_lora_rank": LATENT["q_lora_rank"], "kv_lora_rank": LATENT["kv_lora_rank"], "rope_type": "yarn"},
        **{"qk_head_dim": LATENT["qk_nope_head_dim"], "qk_pos_emb_head_dim": LATENT["qk_rope_head_dim"]},
        **{"v_head_dim": LATENT["v_head_dim"], "rotary_scaling_factor": YARN["factor"], "mscale": YARN["mscale"]},
        **{name: YARN[name] for name in ("original_max_position_embeddings", "mscale_all_dim")},
        "layernorm_epsilon": 1e-6,
    },
}


@contextlib.contextmanager
def grouped_gemm_on_cpu() -> Iterator[None]:
    """Let Megatron's `GroupedMLP` compute on a CPU: `gmm` of the package grouped_gemm, which needs CUDA, by matmuls."""
    from megatron.core.transformer.moe import experts

    def gmm(x: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, trans_b: bool) -> torch.Tensor:
        assert not trans_b
        return torch.cat([part @ weight for part, weight in zip(x.split(counts.tolist()), weights, strict=True)])

    package = SimpleNamespace(ops=SimpleNamespace(gmm=gmm), assert_grouped_gemm_is_available=lambda: None)
    with mock.patch.object(experts, "gg", package), mock.patch.object(experts, "jit_fuser", lambda function: function):
        yield


def transformers_logits(directory: Path) -> torch.Tensor:
    """Return logits of `IDS` in transformers, float32 `[rows, tokens, vocabulary]`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS).logits


def megatron_model(
    state: Any, tensor: int, expert: int, family: str, pipeline: tuple[int, int] = (0, 1), **changes: Any
) -> Any:
    """Return Megatron-Core's own GPT with experts, with random weights and norms."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    moe_utils.te_general_gemm = None
    latent = MEGATRON[family].get("multi_latent_attention")
    heads = {"num_query_groups": SIZES["num_attention_heads"]} if latent else {"kv_channels": 16}
    settings = (MLATransformerConfig if latent else TransformerConfig)(
        **{
            **megatron_settings(),
            **heads,
            "tensor_model_parallel_size": tensor,
            "expert_model_parallel_size": expert,
            "num_moe_experts": EXPERTS,
            "moe_router_topk": TOP_K,
            "moe_ffn_hidden_size": WIDTH,
            "moe_token_dispatcher_type": "allgather",
            "moe_router_load_balancing_type": "none",
            **MEGATRON[family],
            **changes,
        }
    )
    layers = get_gpt_decoder_block_spec(settings, use_transformer_engine=False, normalization="RMSNorm")
    torch.manual_seed(11)
    model = GPTModel(
        config=settings,
        transformer_layer_spec=with_local_attention(layers) if latent else layers,
        vocab_size=SIZES["vocab_size"],
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        rotary_base=10000,
        rotary_percent=0.5 if family == "glm4_moe" else 1.0,
    )
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():  # norms that are not all ones, and experts that differ from rank to rank
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            elif ".experts." in name:
                parameter.add_(0.05 * state.get_expert_model_parallel_rank())
        for name, buffer in model.named_buffers():
            if name.endswith("router.expert_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
        for module in model.modules():
            if type(module).__name__ == "GroupedMLP":
                module.config.bf16 = True  # its forward pass asks for it; the weights are float32
    return model.eval()


def save_megatron_experts(
    folder: Path, tensor: int, expert: int, cases: dict[str, tuple[str, dict[str, Any]]]
) -> dict[str, torch.Tensor]:
    """Save a GPT with experts for each case (family, changes of the settings); return its logits of `IDS`.

    Each is saved as `torch_dist` in `CASE/dist`, and as legacy checkpoint in `CASE/legacy`.
    """
    context = ps.initialize("torch", tensor=tensor, timeout=120)
    with megatron_on_cpu() as state, grouped_gemm_on_cpu():
        state.initialize_model_parallel(tensor, expert_model_parallel_size=expert)
        try:
            return {
                case: _save_megatron(folder / case, state, context, tensor, expert, family, changes)
                for case, (family, changes) in cases.items()
            }
        finally:
            for child in multiprocessing.active_children():  # Megatron's, for saving
                child.kill()


def _save_megatron(
    folder: Path,
    state: Any,
    context: ps.ParallelContext,
    tensor: int,
    expert: int,
    family: str,
    changes: dict[str, Any],
) -> torch.Tensor:
    from megatron.core import dist_checkpointing

    model = megatron_model(state, tensor, expert, family, **changes)
    length = IDS.shape[1]
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
    positions = torch.arange(length)[None].expand(len(IDS), length)
    with torch.no_grad(), mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu")):
        logits = model(IDS, positions, mask)
    if tensor > 1:
        parts = [torch.empty_like(logits) for _ in range(tensor)]
        dist.all_gather(parts, logits.contiguous(), group=state.get_tensor_model_parallel_group())
        logits = torch.cat(parts, dim=-1)
    said = {
        "num_layers": SIZES["num_hidden_layers"],
        "num_experts": EXPERTS,
        "moe_router_topk": TOP_K,
        "moe_ffn_hidden_size": WIDTH,
        "ffn_hidden_size": SIZES["intermediate_size"],
        "expert_model_parallel_size": expert,
        "tensor_model_parallel_size": tensor,
        "moe_layer_freq": 1,
        "moe_router_pre_softmax": False,
        "rotary_base": 10000,
        "rotary_percent": 0.5 if family == "glm4_moe" else 1.0,
        "norm_epsilon": MEGATRON[family].get("layernorm_epsilon", SIZES["rms_norm_eps"]),
        "kv_channels": 16,
        **MEGATRON[family],
        **changes,
    }
    common = {"args": argparse.Namespace(**said), "iteration": 3, "checkpoint_version": 3.0}
    place = folder / "dist" / "iter_0000003"
    ranks = f"{context.axis('tensor').rank:02d}" + (
        f"_{state.get_expert_model_parallel_rank():03d}" if expert > 1 else ""
    )
    legacy = folder / "legacy" / "iter_0000003" / f"mp_rank_{ranks}"  # as get_checkpoint_name of Megatron-LM
    legacy.mkdir(parents=True)
    torch.save({"model": model.state_dict_for_save_checkpoint(), **common}, legacy / "model_optim_rng.pt")
    if context.rank == 0:
        place.mkdir(parents=True)
        for kind in ("dist", "legacy"):
            (folder / kind / "latest_checkpointed_iteration.txt").write_text("3")
    dist.barrier()
    multiprocessing.current_process()._config["daemon"] = False  # Megatron starts a process of its own
    metadata = {"dp_cp_group": state.get_data_parallel_group(with_context_parallel=True)}
    dist_checkpointing.save(model.sharded_state_dict(metadata=metadata) | common, str(place))
    dist.barrier()
    return logits


def save_deepspeed_experts(
    folder: Path, runs: list[tuple[int, int, str]]
) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Train a decoder with experts one step for each (expert ranks, ZeRO stage, dtype), and save its engine.

    The experts are those of DeepSpeed's `MoE`, or of its AutoEP in a Qwen3-MoE for the dtype `"autoep"`.

    Returns:
        For each run the weights of this rank, and its logits of `IDS`.
    """
    context = ps.initialize("deepspeed", timeout=120)
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    class Experts(MoE):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden)[0]

    found = []
    for number, (expert, stage, dtype) in enumerate(runs):
        if dtype == "autoep":
            found.append(_auto_expert_parallel(folder / str(number), context.rank, expert, stage))
            continue
        model = tiny_model(tiny_config("qwen3", **{**SIZES, "intermediate_size": WIDTH}))
        exact = {"drop_tokens": False, "use_rts": False, "top2_2nd_expert_sampling": False}
        for layer in model.model.layers:
            layer.mlp = Experts(SIZES["hidden_size"], Qwen3MLP(model.config), EXPERTS, expert, k=TOP_K, **exact)
        torch.manual_seed(20 + context.rank)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".deepspeed_experts." in name:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "all"}
        )
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        if dtype == "bfloat16":
            settings["bf16"] = {"enabled": True}
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        rows = IDS[context.rank : context.rank + 1]
        engine.backward(engine(rows, labels=rows).loss)
        engine.step()
        engine.save_checkpoint(str(folder / str(number)), tag="step1")
        with torch.no_grad():
            logits = engine(IDS).logits
        weights = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
        found.append((weights, logits))
    return found


def _auto_expert_parallel(folder: Path, rank: int, expert: int, stage: int) -> tuple[dict[str, Any], torch.Tensor]:
    import deepspeed

    config = transformers.AutoConfig.for_model(**expert_config("qwen3_moe", norm_topk_prob=False))
    torch.manual_seed(13)
    model = transformers.AutoModelForCausalLM.from_config(config)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "expert_parallel": {"enabled": True, "autoep_size": expert, "preset_model": "qwen3_moe"},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    rows = IDS[rank : rank + 1]
    engine.backward(engine(rows, labels=rows).loss)
    engine.step()
    engine.save_checkpoint(str(folder), tag="step1")
    with torch.no_grad():
        return {}, engine(IDS).logits
