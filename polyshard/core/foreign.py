"""What a reader of another program's checkpoints gives: logical tensors under Hugging Face names, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from polyshard.core.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is read when it is wanted."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """A checkpoint as logical tensors.

    Attributes:
        tensors: by Hugging Face name.
        config: fields of config.json, where they are known.
        companions: a directory with tokenizer files, where there is one.
        notes: what was passed over, for the user.
    """

    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any] | None = None
    companions: Path | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user says about a conversion.

    Attributes:
        config: fields of config.json, for formats that hold none.
        allow_pickle: files that are pickles may be read. Tensors are read with `weights_only=True`; an index that is
            a pickle can run code.
        tensor_parallel: ranks to write for, in formats with a file for each.
        padded_vocabulary: multiple that the vocabulary is padded to, in formats that pad.
    """

    config: Mapping[str, Any] | None = None
    allow_pickle: bool = False
    tensor_parallel: int = 1
    padded_vocabulary: int = 1

    def need_config(self, name: str) -> Mapping[str, Any]:
        """The configuration, or an error that says how to give it."""
        if self.config is None:
            raise CheckpointError(
                f"{name} checkpoints do not hold the model's configuration: pass --config DIRECTORY, a Hugging Face "
                "directory (or its config.json) of the same architecture"
            )
        return self.config

    def need_pickle(self, path: Path) -> None:
        """Raise where a pickle would have to be read and the user has not allowed it."""
        if not self.allow_pickle:
            raise CheckpointError(
                f"{path} is a pickle, which can run code when it is read: pass --allow-pickle if you trust its origin"
            )


class CheckpointFormat(Protocol):
    """One way in which checkpoints stand on disk."""

    name: str
    writes: bool

    def detect(self, path: Path) -> str | None:
        """What stands at `path`, in words; None where it is of another format. Nothing is unpickled."""
        ...

    def read(self, path: Path, options: Options) -> Foreign:
        """The checkpoint as logical tensors.

        Raises:
            CheckpointError: it is torn, cannot be understood, or needs what the options do not give.
        """
        ...

    def write(self, foreign: Foreign, path: Path, options: Options) -> None:
        """Write logical tensors in this format, into an empty directory."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama-like decoder, as config.json states them."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    qkv_bias: bool = field(default=False)
    qk_norm: bool = field(default=False)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From config.json's fields.

        Raises:
            CheckpointError: a field is missing.
        """
        try:
            heads = config["num_attention_heads"]
            kind = config.get("model_type")
            return cls(
                hidden=config["hidden_size"],
                intermediate=config["intermediate_size"],
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
                qkv_bias=kind == "qwen2" or bool(config.get("attention_bias", False)),
                qk_norm=kind == "qwen3",
            )
        except KeyError as error:
            raise CheckpointError(f"the configuration lacks {error}; expected that of a Llama-like decoder") from None


def lazy(tensor: torch.Tensor) -> LazyTensor:
    """A tensor that is there already."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def load_pickle(path: Path, options: Options) -> Any:
    """A `torch.save` file of tensors and plain data, mapped and not executed.

    Raises:
        CheckpointError: it is torn, holds anything else, or pickles are not allowed.
    """
    options.need_pickle(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as tensors and plain data: {first}") from None


def expected_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and logical shapes of a Llama-like decoder's tensors, as Hugging Face stores them."""
    h, f, d = shape.hidden, shape.intermediate, shape.head_dim
    q, kv = shape.heads * d, shape.kv_heads * d
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, h)}
    for i in range(shape.layers):
        layer = {
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
        if shape.qkv_bias:
            layer |= {f"self_attn.{n}_proj.bias": (size,) for n, size in (("q", q), ("k", kv), ("v", kv))}
        if shape.qk_norm:
            layer |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
        result |= {f"model.layers.{i}.{name}": size for name, size in layer.items()}
    result["model.norm.weight"] = (h,)
    if not shape.tied:
        result["lm_head.weight"] = (shape.vocabulary, h)
    return result


def joined(name: str, parts: Sequence[torch.Tensor], logical: tuple[int, ...]) -> torch.Tensor:
    """Ranks' parts of a tensor as the whole: joined along the dimension in which the parts are short of it.

    Raises:
        CheckpointError: no single dimension explains the parts.
    """
    first = tuple(parts[0].shape)
    if first == logical:
        return parts[0]
    if len(first) == len(logical):
        for dim in range(len(logical)):
            others = all(a == b for d, (a, b) in enumerate(zip(first, logical)) if d != dim)
            found = sum(part.shape[dim] for part in parts)
            if others and found >= logical[dim]:  # more: the vocabulary was padded
                return torch.cat(list(parts), dim=dim).narrow(dim, 0, logical[dim])
    raise CheckpointError(f"{name}: {len(parts)} parts of {list(first)} do not make {list(logical)}")


def named(names: Iterable[str], expected: Iterable[str]) -> dict[str, str]:
    """Expected name to the name found, where they differ by a prefix that a wrapper put before all of them.

    Raises:
        CheckpointError: names are missing, whatever the prefix; the nearest miss is told.
    """
    held, wanted = set(names), list(expected)
    best: list[str] = wanted
    for prefix in ("", "module.", "model.", "app.model.", "_orig_mod.", "module.module.", "state_dict.model."):
        missing = [name for name in wanted if prefix + name not in held]
        if not missing:
            return {name: prefix + name for name in wanted}
        best = min(best, missing, key=len)
    raise CheckpointError(
        f"{len(best)} of the model's {len(wanted)} tensors are missing: {', '.join(best[:5])}; found "
        f"{len(held)} others, such as {', '.join(sorted(held)[:3])}"
    )
