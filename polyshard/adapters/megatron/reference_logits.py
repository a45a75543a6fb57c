"""Logits of a Megatron checkpoint, computed by Megatron-Core's own GPT and loading code in a separate process.

`--verify` compares them with the logits of the weights that polyshard read or wrote. The separate process keeps
Megatron's global state and import side effects out of the caller.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from polyshard.adapters.megatron.expert_arguments import router_settings
from polyshard.adapters.megatron.latent import latent_settings
from polyshard.adapters.megatron.latent_compat import with_local_attention
from polyshard.config.decoder_spec import DecoderSpec
from polyshard.convert.format import Independent, NotComparableError, Options
from polyshard.convert.pickles import load_pickle
from polyshard.core.errors import CheckpointError

TIMEOUT = 600
_REFUSED = "polyshard: Megatron-Core refuses the weights: "


def independent(
    place: Path, kind: str, config: Mapping[str, Any], arguments: Mapping[str, Any], *, ranks: int = 1
) -> Independent:
    """Return a checkpoint as Megatron-Core's own GPT computes it.

    Args:
        place: the directory of the iteration.
        kind: `torch_dist` or `legacy`.
        config: fields of config.json, used for settings that the arguments do not contain.
        arguments: the arguments in the checkpoint.
        ranks: number of ranks that saved the checkpoint.

    Raises:
        NotComparableError: Megatron is not installed, or this one process cannot load the checkpoint.
    """
    if importlib.util.find_spec("megatron") is None:
        raise NotComparableError("megatron-core is not installed")
    if kind == "legacy" and ranks > 1:
        raise NotComparableError(f"Megatron loads the files of {ranks} ranks only in as many processes")
    settings = _settings(DecoderSpec.of(config, experts=True), arguments)

    def logits(ids: torch.Tensor, rounded: torch.dtype | None) -> torch.Tensor:
        with tempfile.TemporaryDirectory(prefix="polyshard-proof-") as folder:
            job = Path(folder) / "job.pt"
            torch.save({"ids": ids, "rounded": rounded, "kind": kind, "place": str(place), **settings}, job)
            command = [sys.executable, "-m", "polyshard.adapters.megatron.reference_logits", str(job)]
            environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
            if done.returncode:
                if _REFUSED in done.stderr:
                    told = done.stderr.rpartition(_REFUSED)[2].strip().splitlines()[0]
                    raise CheckpointError(f"verification failed: {place} is not Megatron-Core's model: {told[:300]}")
                lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
                raise NotComparableError(f"Megatron-Core cannot load it: {lines[-1][:300]}")
            return torch.load(job, weights_only=True)["logits"]

    return Independent(by="Megatron-Core's GPTModel", logits=logits)


def _settings(spec: DecoderSpec, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's settings: the checkpoint's arguments if present, else the configuration."""
    rope = spec.rope
    windows = set(spec.windows)
    window = next((window for window in spec.windows if window is not None), None)
    by_config = {
        "num_layers": spec.layers,
        "hidden_size": spec.hidden,
        "ffn_hidden_size": spec.intermediate,
        "num_attention_heads": spec.heads,
        "num_query_groups": spec.kv_heads,
        "kv_channels": spec.head_dim,
        "rotary_base": rope.theta,
        "rotary_percent": rope.get("partial_rotary_factor", 1.0),
        "rotary_seq_len_interpolation_factor": rope.get("factor") if rope.kind == "linear" else None,
        "use_rope_scaling": rope.kind == "llama3",
        "rope_scaling_factor": rope.get("factor") if rope.kind == "llama3" else 8.0,
        "add_bias_linear": spec.mlp_bias,
        "add_qkv_bias": spec.qkv_bias,
        "norm_epsilon": spec.norm_eps,
        "qk_layernorm": spec.qk_norm,
        "untie_embeddings_and_output_weights": not spec.tied,
        "window_size": None if window is None else "mixed" if len(windows) > 1 else (window - 1, 0),
    }
    if not arguments and not spec.latent and rope.kind not in ("default", "linear", "llama3"):
        raise NotComparableError(f"Megatron-Core's GPT does not support {rope.kind} rotary scaling")
    settings = {name: arguments.get(name, value) for name, value in by_config.items()}
    if arguments.get("group_query_attention") is False:
        settings["num_query_groups"] = settings["num_attention_heads"]
    if settings["window_size"] == "mixed" or arguments.get("window_attn_skip_freq") is not None:
        raise NotComparableError("Megatron-Core's attention on CPU supports only one window for all layers")
    experts = spec.experts
    if experts is not None and experts.score == "sigmoid" and not arguments:
        raise NotComparableError("without Megatron's arguments it is unknown whether the routers have an expert_bias")
    settings |= (
        {}
        if experts is None
        else {
            "num_moe_experts": experts.count,
            "moe_router_topk": experts.top_k,
            "moe_ffn_hidden_size": experts.intermediate,
            "moe_router_pre_softmax": experts.score == "softmax" and not experts.normalized,
            **router_settings(experts),
            "moe_router_enable_expert_bias": bool(arguments.get("moe_router_enable_expert_bias")),
            # Megatron stacks the layers of a checkpoint only if the frequency is 1.
            "moe_layer_freq": 1 if all(experts.sparse) else [int(sparse) for sparse in experts.sparse],
        }
    )
    latent = latent_settings(spec)
    settings |= latent
    sizes = {"vocabulary": spec.vocabulary, "padded": arguments.get("padded_vocab_size")}
    return {"settings": settings, "latent": latent, **sizes}


def main(path: str) -> None:
    """Compute the logits of a job that `independent` wrote, and write them to the job's file."""
    from unittest import mock

    from polyshard.adapters.megatron.compat import cuda_as_cpu, current_device_as_cpu

    job = torch.load(path, weights_only=True)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    with cuda_as_cpu(torch.device("cpu")), mock.patch.object(torch.cuda, "synchronize"):
        parallel_state.initialize_model_parallel(1)
        model = _gpt(job)
        with torch.no_grad():
            biases = (buffer for name, buffer in model.named_buffers() if name.endswith("router.expert_bias"))
            for tensor in (*model.parameters(), *biases):
                tensor.fill_(float("nan"))  # so that a tensor that is not loaded is noticed
        try:
            _load(model, job, parallel_state)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise SystemExit(_REFUSED + lines[0]) from None
        if job["rounded"] is not None:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(job["rounded"]).float()
        ids = job["ids"]
        length = ids.shape[1]
        positions = torch.arange(length)
        mask = positions[None] > positions[:, None]  # True means masked
        if job["settings"]["window_size"]:
            mask |= positions[:, None] - positions[None] > job["settings"]["window_size"][0]
        with torch.no_grad(), current_device_as_cpu(torch.device("cpu")):
            logits = model(ids, positions[None], mask[None, None])
    torch.save({"logits": logits[0, :, : job["vocabulary"]].float().contiguous()}, path)


def _load(model: Any, job: Mapping[str, Any], parallel_state: Any) -> None:
    if job["kind"] == "torch_dist":
        from megatron.core import dist_checkpointing

        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        wanted = model.sharded_state_dict(metadata={"dp_cp_group": group})
        loaded: Any = dist_checkpointing.load(wanted, job["place"])
        loaded = {name: loaded[name] for name in wanted}
    else:
        file = next(iter(sorted(Path(job["place"]).glob("mp_rank_00*/*.pt"))))
        content = load_pickle(file, Options(allow_pickle=True))
        loaded = content.get("model", content)
    result = model.load_state_dict(loaded, strict=False)
    unexpected = [name for name in result.unexpected_keys if "_extra_state" not in name]
    missing = [name for name in result.missing_keys if "_extra_state" not in name]
    if unexpected or missing:
        raise ValueError(f"missing {missing[:5]}, unexpected {unexpected[:5]}")


def _gpt(job: Mapping[str, Any]) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
    from torch.nn import functional as F

    said = job["settings"]
    experts = {name: value for name, value in said.items() if "moe_" in name}
    if experts:
        from megatron.core.transformer.moe import moe_utils

        if not hasattr(moe_utils, "te_general_gemm"):
            moe_utils.te_general_gemm = None  # without Transformer Engine, Megatron reads it but does not set it
        experts |= {"moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "allgather"}
    make: Any = partial(MLATransformerConfig, **job["latent"]) if job["latent"] else TransformerConfig
    settings = make(
        num_layers=said["num_layers"],
        hidden_size=said["hidden_size"],
        num_attention_heads=said["num_attention_heads"],
        num_query_groups=said["num_query_groups"],
        ffn_hidden_size=said["ffn_hidden_size"],
        kv_channels=said["kv_channels"],
        layernorm_epsilon=said["norm_epsilon"],
        add_bias_linear=said["add_bias_linear"],
        add_qkv_bias=said["add_qkv_bias"],
        qk_layernorm=said["qk_layernorm"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        **experts,
    )
    layers: Any = (
        get_gpt_decoder_block_spec(settings, use_transformer_engine=False, normalization="RMSNorm")
        if experts
        else get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=said["qk_layernorm"])
    )
    if job["latent"]:
        layers = with_local_attention(layers)
    model = GPTModel(
        config=settings,
        transformer_layer_spec=layers,
        vocab_size=job["padded"] or job["vocabulary"],
        max_sequence_length=job["ids"].shape[1],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=not said["untie_embeddings_and_output_weights"],
        rotary_base=said["rotary_base"],
        rotary_percent=said["rotary_percent"],
        rope_scaling=bool(said["use_rope_scaling"]),
        rope_scaling_factor=said["rope_scaling_factor"] or 8.0,
        seq_len_interpolation_factor=said["rotary_seq_len_interpolation_factor"],
    )
    return model.eval()


if __name__ == "__main__":
    main(sys.argv[1])
