"""Checkpoints written by the libraries' own save code, and the losses of the libraries' own models."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.nn import functional as F

import polyshard as ps
from support.models.tiny import tiny_config, tiny_model
from support.oracles.megatron_legacy import training_state

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
IDS = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(3))


def megatron_settings():
    """The sizes of `SIZES` and plain settings, as arguments of Megatron-Core's TransformerConfig."""
    return {
        "num_layers": SIZES["num_hidden_layers"],
        "hidden_size": SIZES["hidden_size"],
        "num_attention_heads": SIZES["num_attention_heads"],
        "num_query_groups": SIZES["num_key_value_heads"],
        "ffn_hidden_size": SIZES["intermediate_size"],
        "layernorm_epsilon": SIZES["rms_norm_eps"],
        "use_cpu_initialization": True,
        "params_dtype": torch.float32,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
    }


def config():
    return tiny_config("llama", **SIZES)


def transformers_loss(directory):
    """Mean loss of each token after the one before it, in transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return float(model(IDS, labels=IDS).loss)


def _shifted_loss(logits):
    return float(F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]).float(), IDS[:, 1:].reshape(-1)))


@contextlib.contextmanager
def megatron_on_cpu():
    """Megatron's GPT and its saving, on a machine without CUDA."""
    from polyshard.adapters.megatron.compat import cuda_as_cpu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import initialize_rng_tracker

        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        with cuda_as_cpu(torch.device("cpu")), mock.patch.object(torch.cuda, "synchronize"):
            yield parallel_state


def _gpt(state, size):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = TransformerConfig(**megatron_settings(), tensor_model_parallel_size=size)
    torch.manual_seed(11)
    model = GPTModel(
        config=settings,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=SIZES["vocab_size"],
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        rotary_base=10000,
    )
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():  # norms that are not all ones
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            del name
    return model


def _gpt_loss(model):
    length = IDS.shape[1]
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
    labels = torch.cat((IDS[:, 1:], IDS[:, :1]), dim=1)
    with torch.no_grad():
        losses = model(IDS, torch.arange(length)[None].expand(2, length), mask, labels=labels)
    return float(losses[:, :-1].mean())


def _metadata(state):
    return {"dp_cp_group": state.get_data_parallel_group(with_context_parallel=True)}


def save_megatron(path, size, kind):
    """Save a GPT with random weights with Megatron; return its loss."""
    context = ps.initialize("torch", tensor=size, timeout=120)
    with megatron_on_cpu() as state:
        state.initialize_model_parallel(size)
        model = _gpt(state, size)
        loss = _gpt_loss(model)
        place = Path(path) / "iter_0000003"
        if kind == "torch_dist":
            from megatron.core import dist_checkpointing

            if context.rank == 0:
                place.mkdir(parents=True)
            dist.barrier()
            # Megatron starts a process of its own, which a rank of run_ranks may not, and leaves it behind.
            multiprocessing.current_process()._config["daemon"] = False
            common = {
                "args": argparse.Namespace(num_layers=2, rotary_base=10000),
                "iteration": 3,
                "checkpoint_version": 3.0,
            }
            dist_checkpointing.save(model.sharded_state_dict(metadata=_metadata(state)) | common, str(place))
            dist.barrier()
            for child in multiprocessing.active_children():
                child.kill()
        else:
            folder = place / f"mp_rank_{context.rank:02d}"
            folder.mkdir(parents=True)
            content = {
                "model": model.state_dict_for_save_checkpoint(),
                "iteration": 3,
                "checkpoint_version": 3.0,
                **training_state(),
            }
            torch.save(content, folder / "model_optim_rng.pt")
        dist.barrier()
        if context.rank == 0:
            (Path(path) / "latest_checkpointed_iteration.txt").write_text("3")
    return loss


def load_megatron(path, size):
    """Load a GPT from a torch_dist checkpoint with Megatron; return its loss."""
    ps.initialize("torch", tensor=size, timeout=120)
    with megatron_on_cpu() as state:
        from megatron.core import dist_checkpointing

        state.initialize_model_parallel(size)
        model = _gpt(state, size)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7.0)
        wanted = model.sharded_state_dict(metadata=_metadata(state))
        model.load_state_dict(dist_checkpointing.load(wanted, str(Path(path) / "iter_0000000")), strict=False)
        return _gpt_loss(model)


def save_deepspeed(path, stage, tensor=1, frozen=False):
    """Train a transformers model one step under DeepSpeed and save its engine; return the weights in fp32."""
    context = ps.initialize("deepspeed", tensor=tensor, timeout=120)
    import deepspeed

    model = tiny_model(config()).train()
    if frozen:
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[0].requires_grad_(False)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    if tensor > 1:
        settings["tensor_parallel"] = {"autotp_size": tensor}
    optimizer = None if tensor > 1 else torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    if tensor == 1:
        rows = IDS[context.rank : context.rank + 1]
        engine.backward(engine(rows, labels=rows).loss)
        engine.step()
    # ds_to_universal asks the client for this; no parameter of this model needs a rule.
    engine.save_checkpoint(str(path), tag="step1", client_state={"universal_checkpoint_info": {}})
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter] if stage == 3 else []):
            weights[name] = parameter.detach().clone()
    return weights


def save_dcp(path):
    """A transformers model's state_dict, over two ranks by FSDP2 and torch's distributed checkpoint."""
    ps.initialize("torch", timeout=60)
    from torch.distributed.checkpoint import save
    from torch.distributed.fsdp import fully_shard

    model = tiny_model(config())
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    save({"model": model.state_dict(), "optimizer": {"lr": optimizer.defaults["lr"]}}, checkpoint_id=str(path))


class LlamaBlock(nn.Module):
    """One layer of Llama's reference code, on FairScale's layers."""

    def __init__(self):
        super().__init__()
        from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear

        h, f, d = SIZES["hidden_size"], SIZES["intermediate_size"], 16
        heads, kv = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
        plain = {"bias": False}
        self.attention = nn.Module()
        self.attention.wq = ColumnParallelLinear(h, heads * d, gather_output=False, **plain)
        self.attention.wk = ColumnParallelLinear(h, kv * d, gather_output=False, **plain)
        self.attention.wv = ColumnParallelLinear(h, kv * d, gather_output=False, **plain)
        self.attention.wo = RowParallelLinear(heads * d, h, input_is_parallel=True, **plain)
        self.feed_forward = nn.Module()
        self.feed_forward.w1 = ColumnParallelLinear(h, f, gather_output=False, **plain)
        self.feed_forward.w2 = RowParallelLinear(f, h, input_is_parallel=True, **plain)
        self.feed_forward.w3 = ColumnParallelLinear(h, f, gather_output=False, **plain)
        self.attention_norm = nn.RMSNorm(h, eps=SIZES["rms_norm_eps"])
        self.ffn_norm = nn.RMSNorm(h, eps=SIZES["rms_norm_eps"])

    def forward(self, x):
        normed = self.attention_norm(x)
        q, k, v = (layer(normed).unflatten(-1, (-1, 16)).transpose(1, 2) for layer in self._qkv())
        out = F.scaled_dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True, enable_gqa=True)
        x = x + self.attention.wo(out.transpose(1, 2).flatten(2))
        normed = self.ffn_norm(x)
        return x + self.feed_forward.w2(F.silu(self.feed_forward.w1(normed)) * self.feed_forward.w3(normed))

    def _qkv(self):
        return self.attention.wq, self.attention.wk, self.attention.wv


def _rotate(x):
    """Llama's interleaved rotary embedding, `[batch, heads, seq, head_dim]` as complex numbers."""
    angles = torch.outer(torch.arange(x.shape[2]), 10000.0 ** (-torch.arange(0, 16, 2) / 16))
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


class Llama(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        from fairscale.nn.model_parallel.layers import (
            ColumnParallelLinear,
            ParallelEmbedding,
            VocabParallelEmbedding,
        )

        kind = {"llama2": ParallelEmbedding, "llama3": VocabParallelEmbedding}[embedding]
        h, v = SIZES["hidden_size"], SIZES["vocab_size"]
        self.tok_embeddings = kind(v, h)
        self.layers = nn.ModuleList(LlamaBlock() for _ in range(SIZES["num_hidden_layers"]))
        self.norm = nn.RMSNorm(h, eps=SIZES["rms_norm_eps"])
        self.output = ColumnParallelLinear(h, v, bias=False, gather_output=True)

    def forward(self, ids):
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def llama(path, size, embedding, saving):
    """Llama's reference code on FairScale: save random weights, or load a checkpoint; return the loss."""
    import json

    context = ps.initialize("fairscale", tensor=size, timeout=60)
    torch.manual_seed(8)
    model = Llama(embedding)
    file = Path(path) / f"consolidated.{context.rank:02d}.pth"
    if saving:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.RMSNorm):
                    module.weight.copy_(1 + 0.2 * torch.randn_like(module.weight))
        torch.save(model.state_dict(), file)
        if context.rank == 0:
            params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 128, "norm_eps": 1e-5}
            (Path(path) / "params.json").write_text(json.dumps(params))
    else:
        model.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        return _shifted_loss(model(IDS))
