"""DeepSpeed's checkpoints: its own (`TAG/mp_rank_XX_model_states.pt`, ZeRO's partitions beside them) and universal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from polyshard.adapters.deepspeed.expert_files import PRECISION_NOTE, ROUTING_NOTE, expert_files, with_experts
from polyshard.adapters.shared.hugging_face_names import match
from polyshard.config.decoder_spec import DecoderSpec, expected_shapes
from polyshard.convert.accounting import joined
from polyshard.convert.format import Foreign, Independent, NotComparableError, Options
from polyshard.convert.pickles import load_pickle
from polyshard.core.errors import CheckpointError
from polyshard.weights.lazy_tensor import LazyTensor

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d\d)_model_states\.pt$")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d\d)_optim_states\.pt$")
_STATE_NOTE = "left out the training state: optimizer, scheduler and random states"


class DeepspeedFormat:
    """The checkpoints that `engine.save_checkpoint` writes, of any ZeRO stage."""

    name = "deepspeed"
    writes = False

    def detect(self, path: Path) -> str | None:
        """Detect the files by name."""
        place = _tag(path)
        models = _models(place)
        if not models or any(_universal(path).glob("*/fp32.pt")):
            return None
        partitioned = any(file.name.startswith("zero_pp_rank") for file in models)
        zero = "ZeRO 3" if partitioned else "ZeRO" if _partitions(place) else "no ZeRO"
        experts = f", {count} files of experts" if (count := len(expert_files(place))) else ""
        return f"DeepSpeed's checkpoint, tag {place.name}, {zero}, tensor-parallel {_tensor_size(models)}{experts}"

    def read(self, path: Path, options: Options) -> Foreign:
        """Read the weights; with ZeRO and one tensor-parallel rank the fp32 weights, loaded by DeepSpeed's own code."""
        place = _tag(path)
        config = options.need_config("DeepSpeed's", path, place)
        spec = DecoderSpec.of(config, experts=True)
        models = _models(place)
        _check_files(place, models)
        experts = bool(expert_files(place))
        if experts and not any(file.name.startswith("zero_pp_rank") for file in models):
            ranks: list[Mapping[str, torch.Tensor]] = with_experts(
                place, _modules(place, models, options), spec, options
            )
        elif experts:
            raise CheckpointError(
                f"{place}: ZeRO 3 with experts is unsupported, because DeepSpeed has no code that joins its files. "
                "Save the model at ZeRO 2."
            )
        elif _partitions(place) and _tensor_size(models) == 1:
            options.need_pickle(place)
            ranks = [_of_zero(path, place, models, options)]
        elif any(file.name.startswith("zero_pp_rank") for file in models):
            raise CheckpointError(
                f"{place}: ZeRO 3 with {_tensor_size(models)} tensor-parallel ranks is unsupported. Make it universal "
                f"first: python -m deepspeed.checkpoint.ds_to_universal --input_folder {place} --output_folder OUT"
            )
        else:
            ranks = _modules(place, models, options)
        shapes = expected_shapes(spec)
        logical: dict[str, tuple[int, ...]] = {}
        head = (spec.vocabulary, spec.hidden)  # of a tied model, whose head may also be stored

        def full(name: str) -> torch.Tensor:
            lacking = [index for index, rank in enumerate(ranks) if name not in rank]
            if lacking:
                raise CheckpointError(f"{place}: {name} is missing on tensor rank {lacking[0]}. Copy all ranks.")
            shape = logical.get(name) or (head if name.endswith("lm_head.weight") else tuple(ranks[0][name].shape))
            return joined(name, [rank[name] for rank in ranks], shape)

        embeddings = [name for name in ranks[0] if name.endswith("model.embed_tokens.weight")]
        logical |= dict.fromkeys(embeddings, head)
        names, notes = match(place, {name for rank in ranks for name in rank}, spec, full)
        logical |= {found: shapes[name] for name, found in names.items()}
        tensors = {}
        for name, found in names.items():
            full(found)  # to fail here, and not while writing, if parts do not fit
            tensors[name] = LazyTensor(shapes[name], ranks[0][found].dtype, partial(full, found))
        if experts:
            rounded = any(value.dtype != torch.float32 for value in ranks[0].values())
            notes += (PRECISION_NOTE,) * rounded + (ROUTING_NOTE,)
        return Foreign(tensors=tensors, config=config, companions=path, notes=(*notes, _STATE_NOTE))

    def write(self, foreign: Foreign, path: Path, options: Options) -> tuple[str, ...]:
        """Raise `CheckpointError`: this format is only read."""
        raise CheckpointError("DeepSpeed's format is read, not written: write huggingface instead")

    def independent(self, path: Path, options: Options) -> Independent:
        """The module's state_dict as DeepSpeed's own code gives it, of one tensor-parallel rank."""
        place = _tag(path)
        models = _models(place)
        if expert_files(place):
            raise NotComparableError("DeepSpeed has no code that joins the files of experts")
        if _tensor_size(models) > 1:
            raise NotComparableError(f"DeepSpeed has no code that joins the files of {_tensor_size(models)} ranks")
        if _partitions(place):
            return Independent(by="DeepSpeed's zero_to_fp32", state=_of_zero(path, place, models, options))
        return Independent(by="the module's state_dict", state=_modules(place, models, options)[0])


class DeepspeedUniversalFormat:
    """The universal checkpoints of `ds_to_universal`: `zero/NAME/fp32.pt`, full tensors in fp32."""

    name = "deepspeed-universal"
    writes = False

    def detect(self, path: Path) -> str | None:
        """Detect the folders by name."""
        place = _universal(path)
        found = list(place.glob("*/fp32.pt")) if place.is_dir() else []
        return f"DeepSpeed's universal checkpoint, {len(found)} tensors in fp32" if found else None

    def read(self, path: Path, options: Options) -> Foreign:
        """Read the fp32 weights."""
        place = _universal(path)
        config = options.need_config("DeepSpeed's", path, _tag(path))
        spec = DecoderSpec.of(config)
        options.need_pickle(place)
        content = {folder.name: folder for folder in place.iterdir() if folder.is_dir()}
        torn = sorted(name for name, folder in content.items() if not (folder / "fp32.pt").is_file())
        if torn:
            raise CheckpointError(f"{place / torn[0]} is incomplete: fp32.pt is missing. Copy the full checkpoint.")

        def stored(name: str) -> torch.Tensor:
            value: Any = load_pickle(content[name] / "fp32.pt", options)
            return value["param"] if isinstance(value, dict) else value

        names, notes = match(place, set(content), spec, stored)
        shapes = expected_shapes(spec)

        def load(name: str) -> torch.Tensor:
            padded = name in ("model.embed_tokens.weight", "lm_head.weight")
            return joined(names[name], [stored(names[name])], shapes[name], padded=padded)

        tensors = {name: LazyTensor(shapes[name], torch.float32, partial(load, name)) for name in names}
        return Foreign(tensors=tensors, config=config, companions=path, notes=(*notes, _STATE_NOTE))

    def write(self, foreign: Foreign, path: Path, options: Options) -> tuple[str, ...]:
        """Raise `CheckpointError`: this format is only read."""
        raise CheckpointError("DeepSpeed's format is read, not written: write huggingface instead")

    def independent(self, path: Path, options: Options) -> Independent:
        """Return the tensors in the files, unchanged."""
        place = _universal(path)
        state = {file.parent.name: load_pickle(file, options)["param"] for file in sorted(place.glob("*/fp32.pt"))}
        return Independent(by="the universal files", state=state)


def _tag(path: Path) -> Path:
    latest = path / "latest"
    return path / latest.read_text().strip() if latest.is_file() else path


def _universal(path: Path) -> Path:
    for place in (path / "zero", _tag(path) / "zero"):
        if place.is_dir():
            return place
    latest = path / "latest_universal"
    return path / latest.read_text().strip() / "zero" if latest.is_file() else path / "zero"


def _models(place: Path) -> list[Path]:
    return sorted(file for file in place.glob("*model_states.pt") if _MODEL.match(file.name)) if place.is_dir() else []


def _partitions(place: Path) -> list[Path]:
    return sorted(file for file in place.glob("*_optim_states.pt") if _OPTIMIZER.match(file.name))


def _tensor_size(models: list[Path]) -> int:
    return 1 + max(int(match[2]) for file in models if (match := _MODEL.match(file.name)))


def _check_files(place: Path, models: list[Path]) -> None:
    """Check that the files of all ranks are present and supported.

    Raises:
        CheckpointError: the file of a rank is missing, or there are files of a pipeline.
    """
    known = {*models, *expert_files(place)}
    others = sorted(file.name for file in place.glob("*model_states.pt") if file not in known)
    if others and others[0].startswith("expert_"):
        raise CheckpointError(
            f"{place} holds {len(others)} files of experts in DeepSpeed's first form, such as {others[0]}, which is "
            "unsupported: it does not name the layer. Load and save the checkpoint with a newer DeepSpeed."
        )
    if others:
        raise CheckpointError(
            f"{place} holds {len(others)} files of pipeline layers, such as {others[0]}, which are unsupported. Make "
            "it universal first: python -m deepspeed.checkpoint.ds_to_universal."
        )
    held = {kind: _ranks(files, kind) for kind, files in ((_MODEL, models), (_OPTIMIZER, _partitions(place)))}
    partitioned = any(file.name.startswith("zero_pp_rank") for file in models)  # ZeRO 3: every rank writes both
    everyone = held[_MODEL] | held[_OPTIMIZER]
    for found in held.values():
        wanted = everyone if partitioned else found
        data, tensor = (max((pair[i] for pair in wanted), default=-1) + 1 for i in range(2))
        missing = [(d, t) for d in range(data) for t in range(tensor) if (d, t) not in found]
        if missing:
            raise CheckpointError(
                f"{place} is incomplete: {len(missing)} of {data * tensor} ranks' files are missing, such as that of "
                f"data rank {missing[0][0]}, tensor rank {missing[0][1]}. Copy all ranks."
            )


def _ranks(files: list[Path], pattern: re.Pattern[str]) -> set[tuple[int, int]]:
    """Return the data and tensor ranks of the files."""
    return {(int(match[1] or 0), int(match[2])) for file in files if (match := pattern.match(file.name))}


def _modules(place: Path, models: list[Path], options: Options) -> list[Mapping[str, torch.Tensor]]:
    ranks: list[Mapping[str, torch.Tensor]] = []
    for file in models:
        content = load_pickle(file, options)
        module = content.get("module") if isinstance(content, dict) else None
        if not isinstance(module, dict):
            raise CheckpointError(
                f"{file} holds no weights: got {type(module).__name__} for 'module', expected a state_dict. "
                "Checkpoints of DeepSpeed's pipelines are unsupported: make them universal first."
            )
        _check_rank(file, content, len(models))
        ranks.append({name: value for name, value in module.items() if isinstance(value, torch.Tensor)})
    return ranks


def _check_rank(file: Path, content: Mapping[str, Any], tensor: int) -> None:
    stored = content.get("mp_world_size")
    if isinstance(stored, int) and stored != tensor:
        raise CheckpointError(
            f"{file.parent} is incomplete: {file.name} says that {stored} tensor-parallel ranks saved it, got files of "
            f"{tensor}. Copy all ranks."
        )
    compression = (content.get("ds_config") or {}).get("compression_training") if _plain(content) else None
    if compression:
        raise CheckpointError(
            f"{file} is of a model that DeepSpeed compresses while it computes: got "
            f"compression_training={compression}, expected none. Apply "
            "deepspeed.compression.redundancy_clean first, and save again."
        )


def _plain(content: Mapping[str, Any]) -> bool:
    return isinstance(content.get("ds_config"), dict)


def _of_zero(path: Path, place: Path, models: list[Path], options: Options) -> dict[str, torch.Tensor]:
    """Return the fp32 weights; with ZeRO 1 and 2, frozen parameters come from the module's state_dict."""
    from polyshard.adapters.deepspeed.compat import fp32_weights

    partitioned = any(file.name.startswith("zero_pp_rank") for file in models)
    try:
        weights = fp32_weights(path if place != path else path.parent, place.name, frozen=partitioned)
    except (ValueError, KeyError, FileNotFoundError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{place} cannot be read by DeepSpeed's own code: {type(error).__name__}: {str(error)[:300]}. Copy all "
            "ranks."
        ) from None
    if not partitioned:
        weights = {**_modules(place, models, options)[0], **weights}
    return {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
