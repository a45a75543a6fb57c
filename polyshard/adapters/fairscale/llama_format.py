"""Meta's Llama checkpoints, which FairScale's layers load: `params.json` and a `consolidated.NN.pth` for each rank.

Source: meta-llama/llama (llama/model.py) and transformers' convert_llama_weights_to_hf.py. Meta's rotary embedding is
interleaved and Hugging Face's rotates halves, so the rows of wq and wk are permuted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from polyshard.adapters.fairscale.llama_params import config_of, params_of, read_params
from polyshard.adapters.fairscale.llama_reference import reference_logits
from polyshard.config.decoder_spec import DecoderSpec, expected_shapes
from polyshard.convert.accounting import account, check_frequencies, check_shapes
from polyshard.convert.format import Foreign, Independent, NotComparableError, Options, config_fields_of
from polyshard.convert.pickles import load_pickle
from polyshard.core.errors import CheckpointError
from polyshard.weights.lazy_tensor import LazyTensor

# Llama's name, Hugging Face's name, and the dimension sharded over ranks; None if replicated.
_LAYER = (
    ("attention.wq.weight", "self_attn.q_proj.weight", 0),
    ("attention.wk.weight", "self_attn.k_proj.weight", 0),
    ("attention.wv.weight", "self_attn.v_proj.weight", 0),
    ("attention.wo.weight", "self_attn.o_proj.weight", 1),
    ("feed_forward.w1.weight", "mlp.gate_proj.weight", 0),
    ("feed_forward.w3.weight", "mlp.up_proj.weight", 0),
    ("feed_forward.w2.weight", "mlp.down_proj.weight", 1),
    ("attention_norm.weight", "input_layernorm.weight", None),
    ("ffn_norm.weight", "post_attention_layernorm.weight", None),
)
_UNSAID = (
    "params.json does not contain the constants of its rotary scaling, so those of Meta's code are used, with factor "
    "8. Hugging Face's configurations of Llama 3.2 have factor 32: pass them with --config",
)
_EMBEDDING, _HEAD, _FREQUENCIES = "tok_embeddings.weight", "output.weight", "rope.freqs"


class LlamaFormat:
    """Files `consolidated.NN.pth` with `params.json`."""

    name = "llama"
    writes = True

    def detect(self, path: Path) -> str | None:
        """Detect the files by name."""
        files = _files(path)
        if not files:
            return None
        return f"Llama's own format, model-parallel size {len(files)} ({files[0].name} and on)"

    def read(self, path: Path, options: Options) -> Foreign:
        """Read the weights, joined over all ranks, with wq and wk permuted."""
        ranks = _ranks(path, options)
        config, notes = _config(path, ranks, options)
        spec = DecoderSpec.of(config)
        if _HEAD in ranks[0] and _same_head(path, ranks, spec):
            notes += (f"left out {_HEAD}, which is {_EMBEDDING}: the head is tied",)
        # Llama 1 and 2 shard the embedding along its width, Llama 3 along the vocabulary; the shapes show which.
        part = ranks[0][_EMBEDDING].shape
        embedding = 1 if part[1] * len(ranks) == spec.hidden and len(ranks) > 1 else 0
        tensors: dict[str, LazyTensor] = {}
        for name, stored, dim in _names(spec, embedding):
            if stored == "lm_head.weight" and spec.tied:
                continue
            parts = [_part(rank, name, path) for rank in ranks]
            turn = partial(_half_rotated, spec=spec) if name.endswith(("wq.weight", "wk.weight")) else None
            tensors[stored] = _joined(path, name, parts, dim, turn)
        held = {name for rank in ranks for name in rank}
        account(path, held, {name for name, *_ in _names(spec, embedding)})
        if _FREQUENCIES in held:
            check_frequencies(path, _FREQUENCIES, ranks[0][_FREQUENCIES], spec)
            notes += (f"left out {_FREQUENCIES}, which follows from the configuration",)
        check_shapes(path, {name: tensor.shape for name, tensor in tensors.items()}, expected_shapes(spec))
        return Foreign(tensors=tensors, config=config, companions=path, notes=notes)

    def write(self, foreign: Foreign, path: Path, options: Options) -> tuple[str, ...]:
        """Write one file per rank, sharded as in Llama 3; the files are torch's pickles."""
        assert foreign.config is not None
        spec, size = DecoderSpec.of(foreign.config), options.tensor_parallel
        params, notes = params_of(foreign.config, spec)
        account("the source", foreign.tensors, expected_shapes(spec), "Llama's format has no place for them.")
        for count, what in (
            *((spec.heads, "heads"), (spec.kv_heads, "KV heads")),
            *((spec.vocabulary, "vocabulary"), (spec.intermediate, "MLP width")),
        ):
            if count % size:
                raise CheckpointError(f"{what} {count} cannot be divided by tensor-parallel size {size}")
        for rank in range(size):
            parts: dict[str, torch.Tensor] = {}
            for name, stored, dim in _names(spec, 0):
                if stored == "lm_head.weight" and spec.tied:
                    stored = "model.embed_tokens.weight"  # Meta's code always loads a head
                if stored not in foreign.tensors:
                    raise CheckpointError(f"{stored} is missing")
                full = foreign.tensors[stored].load()
                if name.endswith(("wq.weight", "wk.weight")):
                    full = _interleaved(full, spec)
                parts[name] = (full if dim is None else full.chunk(size, dim=dim)[rank]).contiguous().clone()
            torch.save(parts, path / f"consolidated.{rank:02d}.pth")
        (path / "params.json").write_text(json.dumps(params, indent=1))
        return notes

    def independent(self, path: Path, options: Options) -> Independent:
        """Return Meta's reference forward on the checkpoint's own files."""
        if not (path / "params.json").is_file():
            raise NotComparableError("params.json is missing, which Meta's forward needs")
        ranks = _ranks(path, options)
        unsaid = None if options.config is None else _scaling_of(options.config)
        return Independent(
            by="Meta's reference forward",
            logits=lambda ids, rounded: reference_logits(path, ranks, ids, rounded, unsaid),
        )


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("consolidated.[0-9][0-9].pth")) if path.is_dir() else []


def _ranks(path: Path, options: Options) -> list[Mapping[str, torch.Tensor]]:
    """Return the tensors of all ranks.

    Raises:
        CheckpointError: a file is missing, or its tensors are not those of the other files.
    """
    files = _files(path)
    wanted = [f"consolidated.{rank:02d}.pth" for rank in range(len(files))]
    missing = sorted(set(wanted) - {file.name for file in files})
    if missing:
        raise CheckpointError(f"{path} is incomplete: {missing[0]} is missing. Copy all consolidated.NN.pth.")
    ranks = [load_pickle(file, options) for file in files]
    for file, rank in zip(files, ranks):
        others = [name for name, value in rank.items() if not isinstance(value, torch.Tensor)]
        different = sorted(set(rank) ^ set(ranks[0]))
        if others or different:
            raise CheckpointError(
                f"{file} does not hold the tensors of {files[0].name}: got {(others or different)[:5]}, expected the "
                "same names and tensors. Copy all files of one checkpoint."
            )
    return ranks


def _config(
    path: Path, ranks: list[Mapping[str, torch.Tensor]], options: Options
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return fields of config.json, and notes; params.json takes precedence, because Meta's code computes by it."""
    if not (path / "params.json").is_file():
        return options.need_config("Llama's", path), ()
    params = read_params(path)
    beside = config_fields_of(path) if (path / "config.json").is_file() else None
    given = options.config or beside
    has_head, width = _HEAD in ranks[0], "layers.0.feed_forward.w1.weight"
    for name in (_EMBEDDING, width):
        _part(ranks[0], name, path)
    part = ranks[0][_EMBEDDING].shape
    cut = part[1] != params["dim"]  # along the width
    rows = ranks[0][_HEAD].shape[0] * len(ranks) if has_head else part[0] * (1 if cut else len(ranks))
    if params.get("vocab_size", -1) <= 0 and given is not None:
        params["vocab_size"] = rows = given.get("vocab_size", rows)
    said = params.get("rope_scaling") is not None or params.get("rope_scaling_factor") is not None
    if not said and given is not None:
        params["rope_scaling"] = _scaling_of(given) if params.get("use_scaled_rope") else None
    tied = not has_head or (_equal_head(ranks, cut) if given is None else DecoderSpec.of(given).tied)
    made = config_of(path, params, ranks[0][width].shape[0] * len(ranks), rows, tied)
    if given is None:
        return made, _UNSAID if params.get("use_scaled_rope") and not said else ()
    differences = DecoderSpec.of(made).differences(DecoderSpec.of(given))
    if differences and options.config is not None:
        raise CheckpointError(
            f"--config describes another model than {path / 'params.json'}: got {'; '.join(differences)}, expected "
            "equal fields. Pass --config with the configuration that belongs to this checkpoint."
        )
    if differences:
        rest = {name: value for name, value in given.items() if name not in ("rope_parameters", "rope_scaling")}
        return {**rest, **made}, (
            f"config.json beside params.json describes another model ({'; '.join(differences)}): params.json is used",
        )
    return given, ()


def _scaling_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the constants of llama3 scaling, which params.json lacks and which differ between Llama 3.1 and 3.2."""
    rope = DecoderSpec.of(config).rope
    return dict(rope.parameters) if rope.kind == "llama3" else None


def _same_head(path: Path, ranks: list[Mapping[str, torch.Tensor]], spec: DecoderSpec) -> bool:
    if not spec.tied:
        return False
    if not _equal_head(ranks, ranks[0][_EMBEDDING].shape[1] != spec.hidden):
        raise CheckpointError(
            f"{path} holds a head that is not the embedding: got tie_word_embeddings=true, expected false. Correct the "
            "configuration."
        )
    return True


def _equal_head(ranks: list[Mapping[str, torch.Tensor]], cut: bool) -> bool:
    embedding = torch.cat([rank[_EMBEDDING] for rank in ranks], dim=int(cut))
    head = torch.cat([rank[_HEAD] for rank in ranks])
    return torch.equal(embedding, head)


def _names(spec: DecoderSpec, embedding: int) -> list[tuple[str, str, int | None]]:
    names: list[tuple[str, str, int | None]] = [(_EMBEDDING, "model.embed_tokens.weight", embedding)]
    for i in range(spec.layers):
        names += [(f"layers.{i}.{ours}", f"model.layers.{i}.{theirs}", dim) for ours, theirs, dim in _LAYER]
    return [*names, ("norm.weight", "model.norm.weight", None), (_HEAD, "lm_head.weight", 0)]


def _part(rank: Mapping[str, torch.Tensor], name: str, path: Path) -> torch.Tensor:
    if name not in rank:
        raise CheckpointError(f"{path} is incomplete: {name} is missing. Copy all files of one checkpoint.")
    return rank[name]


def _joined(
    path: Path,
    name: str,
    parts: list[torch.Tensor],
    dim: int | None,
    turn: Callable[[torch.Tensor], torch.Tensor] | None,
) -> LazyTensor:
    size = list(parts[0].shape)
    if dim is None and any(not torch.equal(parts[0], part) for part in parts[1:]):
        raise CheckpointError(
            f"{path}: {name} is replicated, but its ranks disagree: got different values, expected equal ones. Copy "
            "all files of one checkpoint."
        )
    if dim is not None:
        size[dim] = sum(part.shape[dim] for part in parts)

    def load() -> torch.Tensor:
        full = parts[0] if dim is None else torch.cat(parts, dim=dim)
        return full if turn is None else turn(full)

    return LazyTensor(tuple(size), parts[0].dtype, load)


def _half_rotated(full: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
    heads = full.shape[0] // spec.head_dim
    return full.view(heads, spec.head_dim // 2, 2, -1).transpose(1, 2).reshape(full.shape)


def _interleaved(full: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
    heads = full.shape[0] // spec.head_dim
    return full.view(heads, 2, spec.head_dim // 2, -1).transpose(1, 2).reshape(full.shape)
