"""A Llama-like decoder as described by its config.json: sizes, and every field that changes its output.

Missing fields take the defaults of the family's class in transformers (`LlamaConfig` and so on), which is what
`from_pretrained` gives them; `tests/config/test_decoder_spec.py` compares the two with each field left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyshard.config.expert_spec import EXPERT_FAMILIES, ExpertSpec
from polyshard.config.family_defaults import (
    attention_biases,
    has_qk_norm,
    kv_heads,
    norm_eps,
    rope_fields,
    size,
    windows,
)
from polyshard.config.latent_spec import LatentSpec
from polyshard.core.errors import CheckpointError

_REQUIRED = {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# Fields of other families, with the values at which they have no effect. A config of one of the supported families that
# sets one of them to another value describes a model that only its own code can compute.
FOREIGN_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "auto_map": (None,),
    "clip_qkv": (None,),
    "dim_model_base": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "n_routed_experts": (None, 0),
    "no_rope_layers": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "num_nextn_predict_layers": (None, 0),
    "quantization_config": (None,),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1, 1.0),
    "scale_depth": (None,),
    "scale_emb": (None, 1, 1.0),
    "use_qk_norm": (None, False),
}
_OF_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "num_nextn_predict_layers", "use_qk_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """A rotary embedding: its type as named in transformers, its base, and the type's own parameters, sorted."""

    kind: str
    theta: float
    parameters: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], base: float = 10000.0) -> Rope:
        """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (earlier versions).

        Args:
            config: the fields of a config.json.
            base: the family's default base.

        Raises:
            CheckpointError: the fields have the wrong type, are incomplete, or differ by layer type.
        """
        fields: dict[str, Any] = {}
        for name in ("rope_scaling", "rope_parameters"):
            if not isinstance(config.get(name) or {}, Mapping):
                raise CheckpointError(
                    f"the configuration's {name} is wrong: got {config[name]!r}, expected an object or null."
                )
            fields |= config.get(name) or {}
        if any(isinstance(value, Mapping) for value in fields.values()):
            raise CheckpointError(
                f"rope_parameters are unsupported: got one set for each layer type {sorted(fields)}, expected one for "
                "all layers."
            )
        kind = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
        fields.pop("type", None)
        theta = fields.pop("rope_theta", None) or config.get("rope_theta") or base
        partial = fields.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor")
        if kind == "default":
            fields = {}
        missing = [name for name in _REQUIRED.get(kind, ()) if name not in fields]
        if missing:
            raise CheckpointError(
                f"the configuration's rotary scaling {kind} is incomplete: {', '.join(missing)} is missing. Add it to "
                "config.json."
            )
        if kind in ("llama3", "yarn", "longrope"):
            outside = config.get("original_max_position_embeddings")
            if outside is not None:
                fields["original_max_position_embeddings"] = outside
            fields.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
        if partial not in (None, 1, 1.0):
            fields["partial_rotary_factor"] = partial
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(kind=kind, theta=float(theta), parameters=tuple(sorted(plain.items())))

    def get(self, name: str, default: Any = None) -> Any:
        """Return one of the parameters."""
        return dict(self.parameters).get(name, default)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """Sizes and output-relevant settings of a Llama-like decoder.

    Attributes:
        family: `model_type`; one of `FAMILIES`.
        vocabulary: rows of the embedding, without padding.
        tied: whether the head shares the embedding's weight.
        qkv_bias: whether the q, k and v projections have biases.
        output_bias: whether the attention's output projection has a bias.
        mlp_bias: whether the gate, up and down projections have biases.
        qk_norm: whether queries and keys are normalized, with one weight for each channel of a head.
        windows: sliding window of each layer; None for full attention.
        experts: the experts of the layers that have some; None for a dense model.
        latent: multi-head latent attention, for which `kv_heads` is `heads`; None for other attention.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    norm_eps: float
    activation: str
    rope: Rope
    windows: tuple[int | None, ...]
    experts: ExpertSpec | None = None
    latent: LatentSpec | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], *, experts: bool = False) -> DecoderSpec:
        """Read the fields of a config.json.

        Args:
            config: the fields.
            experts: whether the caller supports mixtures of experts (`EXPERT_FAMILIES`).

        Raises:
            CheckpointError: a field is missing or invalid, or the family is unsupported.
        """
        family, families = config.get("model_type"), FAMILIES + EXPERT_FAMILIES * experts
        if family not in families:
            raise CheckpointError(
                f"the configuration's model_type is unsupported: got {family!r}, expected one of "
                f"{', '.join(families)}. "
                "Convert between Hugging Face directories, which copies every tensor, or with the model's own tools."
            )
        if "self" in config:
            raise CheckpointError("the configuration is wrong: got a key 'self', which is not a field. Remove it.")
        try:
            heads, hidden, layers = (
                size(config, n) for n in ("num_attention_heads", "hidden_size", "num_hidden_layers")
            )
            latent = LatentSpec.of(config)
            qkv_bias, output_bias = attention_biases(config, family)
            head_dim = config.get("head_dim", 128 if family == "qwen3" else None)
            if family == "qwen3" and head_dim is None:
                raise CheckpointError("the configuration's head_dim is wrong: got null, expected an integer.")
            return cls(
                family=family,
                hidden=hidden,
                intermediate=size(config, "intermediate_size"),
                layers=layers,
                heads=heads,
                kv_heads=heads if latent else kv_heads(config, family, heads),
                head_dim=latent.plain + latent.rotated if latent else head_dim or hidden // heads,
                vocabulary=size(config, "vocab_size"),
                tied=bool(config.get("tie_word_embeddings", False)),
                qkv_bias=qkv_bias,
                output_bias=output_bias,
                mlp_bias=family == "llama" and bool(config.get("mlp_bias") or False),
                qk_norm=has_qk_norm(config, family),
                norm_eps=norm_eps(config, family),
                activation=config.get("hidden_act", "silu"),
                rope=Rope.of(rope_fields(config, family), 1e6 if family == "mixtral" else 10000.0),
                windows=windows(config, family, layers),
                experts=ExpertSpec.of(config, layers),
                latent=latent,
            )
        except KeyError as error:
            raise CheckpointError(
                f"the configuration is incomplete: {error.args[0]} is missing. Add it to config.json."
            ) from None

    def same_function(self, other: DecoderSpec) -> bool:
        """Return whether both describe the same function of the same tensors. The family's name is not compared."""
        return not self.differences(other)

    def differences(self, other: DecoderSpec) -> list[str]:
        """Return the fields in which the two differ, as `field: ours, theirs`."""
        names = [name for name in self.__slots__ if name != "family"]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name}: {ours}, {theirs}" for name, ours, theirs in pairs if ours != theirs]


def foreign_fields(config: Mapping[str, Any]) -> list[str]:
    """Return the fields of other families whose values change the output there, as `field=value`.

    Layers of multi-token prediction, of which families with experts have a number, change no output.
    """
    own = _OF_EXPERTS if config.get("model_type") in EXPERT_FAMILIES else ()
    return [
        f"{name}={config[name]!r}"
        for name, same in FOREIGN_FIELDS.items()
        if name in config and config[name] not in same and name not in own
    ]


def expected_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Return names and logical shapes of a Llama-like decoder's tensors, as Hugging Face stores them."""
    if spec.heads % spec.kv_heads:
        raise CheckpointError(
            f"the configuration's num_key_value_heads is wrong: got {spec.kv_heads}, expected a divisor of "
            f"{spec.heads} "
            "heads."
        )
    h, f, d = spec.hidden, spec.intermediate, spec.head_dim
    q, kv = spec.heads * d, spec.kv_heads * d
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocabulary, h)}
    for i in range(spec.layers):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (h,),
            "self_attn.q_proj.weight": (q, h),
            "self_attn.k_proj.weight": (kv, h),
            "self_attn.v_proj.weight": (kv, h),
            "self_attn.o_proj.weight": (h, q),
            "post_attention_layernorm.weight": (h,),
            "mlp.gate_proj.weight": (f, h),
            "mlp.up_proj.weight": (f, h),
            "mlp.down_proj.weight": (h, f),
        }
        if spec.qkv_bias:
            layer |= {f"self_attn.{n}_proj.bias": (size,) for n, size in (("q", q), ("k", kv), ("v", kv))}
        if spec.output_bias:
            layer["self_attn.o_proj.bias"] = (h,)
        if spec.mlp_bias:
            layer |= {f"mlp.{n}_proj.bias": (size,) for n, size in (("gate", f), ("up", f), ("down", h))}
        if spec.qk_norm:
            layer |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
        if spec.latent is not None:
            layer = {name: size for name, size in layer.items() if not name.startswith("self_attn.")}
            layer |= spec.latent.shapes(h, spec.heads)
        if spec.experts is not None and spec.experts.sparse[i]:
            layer = {name: size for name, size in layer.items() if not name.startswith("mlp.")}
            result |= spec.experts.shapes(i, h)
        result |= {f"model.layers.{i}.{name}": size for name, size in layer.items()}
    result["model.norm.weight"] = (h,)
    if not spec.tied:
        result["lm_head.weight"] = (spec.vocabulary, h)
    return result
