"""A small decoder with multi-head latent attention, and the functions that tests run with it on two ranks."""

import torch
from torch import nn

import polyshard as ps

HIDDEN = 48
SIZES = {"kv_lora_rank": 24, "qk_nope_head_dim": 20, "qk_rope_head_dim": 12, "v_head_dim": 16}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


class Model(nn.Module):
    def __init__(self, config, parallel_context):
        super().__init__()
        self.embed = ps.vocab_embedding(config.vocab_size, HIDDEN, parallel_context)
        self.layers = nn.ModuleList(
            ps.TrainableMLA(
                HIDDEN,
                config.num_attention_heads,
                q_lora_rank=20,
                **SIZES,
                rotary=ps.RotaryEmbedding(SIZES["qk_rope_head_dim"]),
                parallel_context=parallel_context,
                layer_index=index,
            )
            for index in range(config.num_hidden_layers)
        )
        self.norm = ps.rms_norm(HIDDEN, parallel_context)
        self.head = ps.lm_head(HIDDEN, config.vocab_size, parallel_context)

    def forward(self, input_ids, positions=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x, positions)
        return self.norm(x)

    def compute_logits(self, hidden):
        return self.head(hidden)


def build(config, parallel_context):
    return Model(config, parallel_context)


def initial(name, shape, generator):
    return torch.ones(shape) if len(shape) < 2 else torch.randn(shape, generator=generator) * 0.3


def checkpoint(directory, **changes):
    """A trainer's context, its model, and the checkpoint in `directory`."""
    context, config = ps.initialize("torch"), {**CONFIG, **changes}
    model = build(ps.ModelConfig(**config), context)
    ps.initialize_weights(model, context, initializer=initial)
    ps.save_checkpoint(model, directory, context, config=config)
    return context, model


def take_deepseek_sizes(monkeypatch):
    """Latents of 512 and rotated keys of 64, for which vLLM has kernels on CPU; return the config fields."""
    sizes = {**SIZES, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    monkeypatch.setattr(f"{__name__}.SIZES", sizes)
    return {"model_type": "deepseek_v3", "q_lora_rank": 20, **sizes}


def over_two(axis):
    """Output and gradients of one layer over two ranks, beside those of one process."""
    context = ps.initialize("torch", timeout=60, **{axis: 2})
    single = ps.GroupContext(layout=ps.ParallelLayout(), device=context.device, linear=context.linear)
    layers = []
    for where in (context, single):
        layer = ps.TrainableMLA(
            HIDDEN, 4, q_lora_rank=20, **SIZES, rotary=ps.RotaryEmbedding(12), parallel_context=where
        )
        ps.initialize_weights(layer, where, initializer=initial)
        layers.append(layer)
    x = torch.randn(24, HIDDEN, generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor([0, 9, 24])
    parts = [ps.context_shard(x, context), x]
    outs = [layer(part, cu_seqlens=bounds) for layer, part in zip(layers, parts)]
    for out in outs:
        out.square().sum().backward()
    pairs = [(outs[0].detach(), ps.context_shard(outs[1].detach(), context))]
    group = context.axis(axis).collectives
    wanted = {name: p.grad for name, p in layers[1].named_parameters()}
    table = ps.collect_layouts(layers[0])
    for name, parameter in layers[0].named_parameters():
        if axis == "context":
            pairs.append((group.all_reduce(parameter.grad), wanted[name]))
        else:
            shards = list(group.all_gather(parameter.grad.unsqueeze(0), 0))
            pairs.append((table[name].layout.assemble(shards), wanted[name]))
    ps.shutdown(context)
    return pairs
