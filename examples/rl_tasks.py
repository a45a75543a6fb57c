"""Tasks for reinforcement learning with rule-based rewards. They download nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import decoder
import moe
import torch

import polyshard as ps


class Successor:
    """Answer four digits with the successor of each. A model with random weights learns it from rewards only."""

    begin, end = 10, 11  # token IDs after those of the digits
    max_tokens, stop_token_ids = 4, ()
    model = None
    build: Any = staticmethod(decoder.build_model)
    factory = "decoder:build_model"
    config = ps.ModelConfig(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=12,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )

    def prompts(self, count: int, generator: torch.Generator) -> list[list[int]]:
        """Return prompts of four digits."""
        return [
            [self.begin, *digits, self.end] for digits in torch.randint(10, (count, 4), generator=generator).tolist()
        ]

    def reward(self, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
        """Return the fraction of correct digits."""
        return sum(token == (digit + 1) % 10 for digit, token in zip(prompt[1:-1], tokens)) / 4


class Experts(Successor):
    """The same task for a mixture of experts."""

    build: Any = staticmethod(moe.build_model)
    factory = "moe:build_model"
    config = ps.ModelConfig(
        model_type="qwen3_moe",
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=12,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


class Addition:
    """Add two numbers below thirty, given three examples; for a pretrained model."""

    max_tokens = 4
    build: Any = staticmethod(decoder.build_model)
    factory = "decoder:build_model"

    def __init__(self, model: Path) -> None:
        import transformers

        self.model, self.config = model, ps.read_config(model)
        tokenizers: Any = transformers.AutoTokenizer
        self.tokenizer = tokenizers.from_pretrained(model)
        self.stop_token_ids = tuple(self.tokenizer.encode("\n"))

    def prompts(self, count: int, generator: torch.Generator) -> list[list[int]]:
        """Return prompts of text that the model continues."""
        pairs = torch.randint(30, (count, 2), generator=generator).tolist()
        return [self.tokenizer.encode(f"2 + 3 = 5\n14 + 11 = 25\n7 + 22 = 29\n{a} + {b} =") for a, b in pairs]

    def reward(self, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
        """Return 1 if the first number of the answer is the sum, else 0."""
        question = re.search(r"(\d+) \+ (\d+) =$", self.tokenizer.decode(prompt))
        answer = re.search(r"\d+", self.tokenizer.decode(tokens))
        assert question is not None
        return float(answer is not None and int(answer[0]) == int(question[1]) + int(question[2]))
