"""Another library's layers in user code: Megatron-Core's, without polyshard's adapter for Megatron.

    torchrun --nproc-per-node 2 examples/megatron_adapter.py CHECKPOINT    trains and saves a small model
    python examples/megatron_adapter.py CHECKPOINT --generate              serves it in vLLM, with the same layers

`MegatronLinearAdapter` is the only integration code. The model uses both kinds of layers: the MLP is built from
Megatron's, attention from the context's default layers. Both use the same process groups.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import nn

import polyshard as ps

VOCAB = 61


class MegatronLinearAdapter:
    """A `polyshard.LinearAdapter` for Megatron's layers; polyshard unwraps their `(output, bias)` tuples."""

    @staticmethod
    def create_column_parallel(
        input_size: int, output_size: int, parallel_context: Any, bias: bool = False
    ) -> nn.Module:
        """Build Megatron's ColumnParallelLinear."""
        from megatron.core.tensor_parallel import ColumnParallelLinear

        return ColumnParallelLinear(
            input_size, output_size, bias=bias, gather_output=False, **MegatronLinearAdapter._common(parallel_context)
        )

    @staticmethod
    def create_row_parallel(input_size: int, output_size: int, parallel_context: Any, bias: bool = False) -> nn.Module:
        """Build Megatron's RowParallelLinear."""
        from megatron.core.tensor_parallel import RowParallelLinear

        common = MegatronLinearAdapter._common(parallel_context)
        return RowParallelLinear(
            input_size, output_size, bias=bias, input_is_parallel=True, skip_bias_add=False, **common
        )

    @staticmethod
    def _common(parallel_context: Any) -> dict[str, Any]:
        from megatron.core.model_parallel_config import ModelParallelConfig

        config = ModelParallelConfig(
            tensor_model_parallel_size=parallel_context.get_tensor_parallel_world_size(),
            use_cpu_initialization=True,
            params_dtype=torch.get_default_dtype(),
        )
        group = parallel_context.get_tensor_parallel_group()
        return {"config": config, "init_method": nn.init.xavier_normal_, "tp_group": group}


class Block(nn.Module):
    """Attention from the context's default layers and an MLP from Megatron's."""

    def __init__(self, config: Any, parallel_context: ps.ParallelContext) -> None:
        super().__init__()
        h = config.hidden_size
        megatron = MegatronLinearAdapter
        self.norm1, self.norm2 = ps.rms_norm(h, parallel_context), ps.rms_norm(h, parallel_context)
        self.attention = ps.TrainableFlashAttention(
            h, config.num_attention_heads, parallel_context=parallel_context, rotary=ps.RotaryEmbedding(config.head_dim)
        )
        self.up = ps.column_parallel(h, 4 * h, parallel_context, bias=True, linear=megatron)
        self.down = ps.row_parallel(4 * h, h, parallel_context, bias=True, linear=megatron)

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Return the block's output `[..., hidden]`, the shape of the input."""
        x = x + self.attention(self.norm1(x), positions)
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """A small decoder."""

    def __init__(self, config: Any, parallel_context: ps.ParallelContext) -> None:
        super().__init__()
        self.embed = ps.vocab_embedding(config.vocab_size, config.hidden_size, parallel_context)
        self.blocks = nn.ModuleList(Block(config, parallel_context) for _ in range(config.num_hidden_layers))
        self.norm = ps.rms_norm(config.hidden_size, parallel_context)
        self.head = ps.lm_head(config.hidden_size, config.vocab_size, parallel_context)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Return the hidden states."""
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, positions)
        return self.norm(x)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard of the logits."""
        return self.head(hidden)


def build_model(config: Any, parallel_context: ps.ParallelContext) -> Model:
    """Build the model, for training and for serving."""
    return Model(config, parallel_context)


def train(checkpoint: str, steps: int = 60) -> float:
    """Train the model to count by threes; return the last loss."""
    context = ps.initialize("torch", tensor=2)
    config = ps.ModelConfig(
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=64,
        head_dim=32,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = build_model(config, context)
    ps.initialize_weights(model, context, seed=0)
    trainer = ps.load_adapter("torch").engine(model, ps.AdamW(lr=1e-2), context)
    generator = torch.Generator().manual_seed(0)
    loss = math.inf
    for _ in range(steps):
        tokens = (torch.randint(VOCAB, (16, 1), generator=generator) + 3 * torch.arange(17)) % VOCAB
        tokens = tokens.to(context.device)
        loss = float(trainer.train_batch([{"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}]).loss)
        trainer.step()
    ps.save_checkpoint(trainer, checkpoint, context, config=config, architecture="MegatronMixed")
    if context.get_tensor_parallel_rank() == 0:
        print(f"loss {loss:.3f}")
    ps.shutdown(context)
    return loss


def generate(checkpoint: str) -> list[int]:
    """Continue a count in vLLM, with the MLP from Megatron's layers and attention from vLLM's."""
    ps.register_model("MegatronMixed", build_model)
    from vllm import LLM, SamplingParams

    llm = LLM(checkpoint, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 26)
    answer = llm.generate({"prompt_token_ids": [1, 4, 7, 10]}, SamplingParams(temperature=0, max_tokens=6))
    return list(answer[0].outputs[0].token_ids)


if __name__ == "__main__":
    if "--generate" in sys.argv:
        print(generate(sys.argv[1]))
    else:
        train(sys.argv[1])
