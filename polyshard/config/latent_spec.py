"""Multi-head latent attention of a decoder, as described by its config.json.

Missing fields take the defaults of `DeepseekV3Config` in transformers, as in `DecoderSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyshard.config.family_defaults import size

LATENT_FAMILIES = ("deepseek_v3",)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Keys and values that are projected from a small latent, and queries that may be.

    Attributes:
        query_rank: width of the queries' latent; None if queries are projected from hidden states.
        rank: width of the latent of keys and values.
        plain: width of a head's queries and keys that are not rotated.
        rotated: width of a head's queries, and of the keys of all heads, that are rotated.
        value: width of a head's values.
        bias: whether the projections to latents and the output projection have biases.
        interleaved: whether rotary pairs are neighbouring channels.
    """

    query_rank: int | None
    rank: int
    plain: int
    rotated: int
    value: int
    bias: bool
    interleaved: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LatentSpec | None:
        """Read the fields of a config.json; None for a family with other attention.

        Raises:
            CheckpointError: a field is invalid.
        """
        if config.get("model_type") not in LATENT_FAMILIES:
            return None
        query_rank = config.get("q_lora_rank", 1536)
        sizes = (("kv_lora_rank", 512), ("qk_nope_head_dim", 128), ("qk_rope_head_dim", 64), ("v_head_dim", 128))
        rank, plain, rotated, value = (size({name: config.get(name, default)}, name) for name, default in sizes)
        return cls(
            query_rank=None if query_rank is None else size({"q_lora_rank": query_rank}, "q_lora_rank"),
            rank=rank,
            plain=plain,
            rotated=rotated,
            value=value,
            bias=bool(config.get("attention_bias") or False),
            interleaved=bool(config.get("rope_interleave", True)),
        )

    def shapes(self, hidden: int, heads: int) -> dict[str, tuple[int, ...]]:
        """Return names within a layer, and shapes, of the attention's tensors as Hugging Face stores them."""
        query = heads * (self.plain + self.rotated)
        found: dict[str, tuple[int, ...]] = {
            "self_attn.kv_a_proj_with_mqa.weight": (self.rank + self.rotated, hidden),
            "self_attn.kv_a_layernorm.weight": (self.rank,),
            "self_attn.kv_b_proj.weight": (heads * (self.plain + self.value), self.rank),
            "self_attn.o_proj.weight": (hidden, heads * self.value),
        }
        if self.query_rank is None:
            found["self_attn.q_proj.weight"] = (query, hidden)
        else:
            found["self_attn.q_a_proj.weight"] = (self.query_rank, hidden)
            found["self_attn.q_a_layernorm.weight"] = (self.query_rank,)
            found["self_attn.q_b_proj.weight"] = (query, self.query_rank)
        if self.bias:
            biased = ("kv_a_proj_with_mqa", "o_proj", *(() if self.query_rank is None else ("q_a_proj",)))
            found |= {f"self_attn.{name}.bias": found[f"self_attn.{name}.weight"][:1] for name in biased}
        return found
