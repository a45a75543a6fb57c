"""GGUF files: Llama-like decoders are read tensor by tensor, other architectures through transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from polyshard.config.decoder_spec import DecoderSpec, expected_shapes
from polyshard.convert.accounting import account, check_shapes
from polyshard.convert.format import Foreign, Independent, Options, lazy
from polyshard.convert.gguf_metadata import ARCHITECTURES, config_of, scaling_of_factors
from polyshard.core.errors import CheckpointError, MissingDependencyError
from polyshard.weights.lazy_tensor import LazyTensor

_MAGIC = b"GGUF"
_FACTORS = "rope_freqs.weight"
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Keys of other architectures, and the field of transformers' configuration that must agree with each.
_STATED = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.dimension_count": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)$")


class GgufFormat:
    """A single `.gguf` file. Quantized weights are dequantized to float32."""

    name = "gguf"
    writes = False

    def detect(self, path: Path) -> str | None:
        """Detect the format by the first bytes of the file."""
        files = _files(path)
        if not files:
            return None
        size = sum(file.stat().st_size for file in files) / 1e6
        return f"a GGUF file of {size:.0f} MB" if len(files) == 1 else f"{len(files)} GGUF files of {size:.0f} MB"

    def read(self, path: Path, options: Options) -> Foreign:
        """Read weights, configuration and tokenizer."""
        file = _file(path)
        reader = _reader(file)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        if fields.get("split.count", 1) > 1:
            raise CheckpointError(
                f"{file} is one part of several: got part {fields.get('split.no', 0) + 1} of {fields['split.count']}, "
                "expected one file. Merge them first: llama-gguf-split --merge FIRST_PART OUT.gguf."
            )
        if fields.get("general.type", "model") != "model":
            raise CheckpointError(
                f"{file} is not a model: got general.type={fields['general.type']!r}, expected 'model'. Merge adapters "
                "into the model first."
            )
        if fields.get("general.architecture") not in ARCHITECTURES:
            return _by_transformers(file, fields, {tensor.name for tensor in reader.tensors}, options)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        sizes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in stored.items()}
        made = config_of(file, fields, sizes)
        if _FACTORS in stored:
            scaling = scaling_of_factors(file, made, _dequantized(stored[_FACTORS]))
            made |= {"rope_scaling": scaling} if scaling else {}
        spec = DecoderSpec.of(made)
        config = _agreed(file, made, options)
        names = {name: _gguf_name(name) for name in expected_shapes(spec)}
        account(file, set(stored) - {_FACTORS}, names.values(), "Convert the model's Hugging Face directory instead.")
        check_shapes(file, {n: sizes[g] for n, g in names.items() if g in sizes}, expected_shapes(spec))
        tensors = {
            name: LazyTensor(
                sizes[found], torch.float32, partial(_loaded, stored[found], _turned(name, made["model_type"], spec))
            )
            for name, found in names.items()
        }
        return Foreign(tensors=tensors, config=config, tokenizer=partial(_write_tokenizer, file, fields))

    def write(self, foreign: Foreign, path: Path, options: Options) -> tuple[str, ...]:
        """Raise `CheckpointError`: GGUF is read only."""
        raise CheckpointError("GGUF cannot be written. Use llama.cpp's convert_hf_to_gguf.py instead.")

    def independent(self, path: Path, options: Options) -> Independent:
        """Return transformers' own reading of GGUF."""
        file = _file(path)
        return Independent(by="transformers' GGUF loader", directory=file.parent, gguf=file.name)


def _files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.glob("*.gguf")) if path.is_dir() else []
    return [file for file in files if _begins(file) == _MAGIC]


def _begins(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(len(_MAGIC))


def _file(path: Path) -> Path:
    files = _files(path)
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:5])
        raise CheckpointError(
            f"{path} holds {len(files)} GGUF files: got {names}, expected one. Name the file; merge the parts of one "
            "model first with llama-gguf-split --merge."
        )
    return files[0]


def _reader(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingDependencyError("GGUF needs transformers and gguf: pip install 'polyshard[examples]'") from None
    try:
        return GGUFReader(str(file))
    except (ValueError, KeyError, IndexError, OSError, OverflowError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{file} is truncated or not a GGUF file: {detail}. Copy it again.") from None


def _gguf_name(name: str) -> str:
    if match := _HF_LAYER.match(name):
        return f"blk.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
    return _OUTSIDE[name]


def _turned(name: str, family: str, spec: DecoderSpec) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the permutation of q and k that undoes llama.cpp's interleaved rotary layout, or None if there is none."""
    if family != "llama" or not re.search(r"self_attn\.[qk]_proj\.", name):
        return None
    heads = spec.heads if ".q_proj." in name else spec.kv_heads
    return lambda full: full.view(heads, spec.head_dim // 2, 2, -1).transpose(1, 2).reshape(full.shape)


def _dequantized(tensor: Any) -> torch.Tensor:
    from gguf.quants import dequantize

    try:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"{tensor.name} cannot be dequantized: got {tensor.tensor_type.name}, which the gguf package does not "
            f"support ({error}). Quantize the model otherwise, or convert its Hugging Face directory."
        ) from None
    return values.float().reshape([int(n) for n in reversed(tensor.shape)])


def _loaded(tensor: Any, turn: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
    values = _dequantized(tensor)
    return values if turn is None else turn(values)


def _agreed(file: Path, made: dict[str, Any], options: Options) -> Mapping[str, Any]:
    if options.config is None:
        return made
    theirs = DecoderSpec.of(options.config)
    stored = torch.tensor(theirs.norm_eps, dtype=torch.float32).item()  # as GGUF rounds it
    differences = DecoderSpec.of(made).differences(replace(theirs, norm_eps=stored))
    if differences:
        raise CheckpointError(
            f"--config describes another model than {file}: got {'; '.join(differences)}, expected equal fields. Omit "
            "--config."
        )
    return options.config


def _by_transformers(file: Path, fields: Mapping[str, Any], held: set[str], options: Options) -> Foreign:
    """Read an architecture through transformers; reject files from which it would drop something."""
    try:
        import transformers
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
    except ImportError:
        raise MissingDependencyError("GGUF needs transformers and gguf: pip install 'polyshard[examples]'") from None
    architecture = str(fields.get("general.architecture"))
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
    except (ValueError, OSError, KeyError, RuntimeError, NotImplementedError, TypeError) as error:
        raise CheckpointError(f"transformers cannot read {file}: {str(error).splitlines()[0]}") from None
    known = GGUF_CONFIG_MAPPING.get(model.config.model_type.removesuffix("_text"), {})
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    unread = [prefix + key for key in own if key not in known and not _stated(model.config, key, own[key])]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    dropped = sorted(held - set(get_gguf_hf_weights_map(model, processor)) - {_FACTORS})
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    missing = sorted(set(report["missing_keys"]) - tied)
    if unread or dropped or missing or _FACTORS in held:
        raise CheckpointError(
            f"transformers does not read all of {file}: metadata {[f'{k}={fields[k]!r}' for k in unread][:5]} and "
            f"tensors {[*dropped, *(n for n in held if n == _FACTORS)][:5]} would be dropped, and {missing[:5]} "
            "randomly initialized. Convert the model's Hugging Face directory instead."
        )
    config = dict(options.config or model.config.to_dict())
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    config["architectures"] = [type(model).__name__]
    tensors = {name: lazy(value) for name, value in model.state_dict().items() if name not in tied}
    return Foreign(tensors=tensors, config=config, tokenizer=partial(_write_tokenizer, file, fields))


def _stated(config: Any, key: str, value: Any) -> bool:
    """Return whether a key that transformers does not read agrees with its configuration."""
    field = _STATED.get(key)
    return field is not None and getattr(config, field, None) == value


def _write_tokenizer(file: Path, fields: Mapping[str, Any], directory: Path) -> tuple[str, ...]:
    """Write the tokenizer of the GGUF file as transformers converts it, and return notes."""
    tokens = fields.get("tokenizer.ggml.tokens")
    if not tokens:
        return ()
    try:
        import transformers

        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        found = tokenizer.convert_ids_to_tokens(list(range(len(tokens))))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return (f"the GGUF file's tokenizer is left out because transformers cannot convert it: {lines[0][:200]}",)
    if list(found) != list(tokens):
        index = next(i for i, (ours, theirs) in enumerate(zip(found, tokens)) if ours != theirs)
        return (
            f"the GGUF file's tokenizer is left out because it differs in transformers: id {index} is "
            f"{found[index]!r} there and {tokens[index]!r} in the file",
        )
    tokenizer.save_pretrained(directory)
    kind = f"{fields.get('tokenizer.ggml.model')}, {fields.get('tokenizer.ggml.pre', 'default')}"
    return (f"the tokenizer ({kind}) was converted by transformers; compare its tokens with the model's own",)
