"""DeepSpeed's checkpoints: its own (`TAG/mp_rank_XX_model_states.pt`, ZeRO's partitions beside them) and universal."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from polyshard.core.errors import CheckpointError
from polyshard.core.foreign import (
    Foreign,
    LazyTensor,
    Options,
    Shape,
    expected_shapes,
    joined,
    lazy,
    load_pickle,
    named,
)


class DeepspeedFormat:
    """What `engine.save_checkpoint` writes, of any ZeRO stage."""

    name = "deepspeed"
    writes = False

    def detect(self, path: Path) -> str | None:
        """Files by name."""
        place = _tag(path)
        models = sorted(place.glob("*mp_rank_*_model_states.pt")) if place.is_dir() else []
        if not models or any(_universal(path).glob("*/fp32.pt")):
            return None
        partitioned = any(file.name.startswith("zero_pp_rank") for file in models)
        zero = "ZeRO 3" if partitioned else "ZeRO" if list(place.glob("*zero_pp_rank_*_optim_states.pt")) else "no ZeRO"
        return f"DeepSpeed's checkpoint, tag {place.name}, {zero}, tensor-parallel {_tensor_size(models)}"

    def read(self, path: Path, options: Options) -> Foreign:
        """The model's weights; with ZeRO and one tensor-parallel rank the fp32 ones, by DeepSpeed's own code."""
        config = options.need_config("DeepSpeed's")
        place = _tag(path)
        shapes = expected_shapes(Shape.of(config))
        models = sorted(place.glob("*mp_rank_*_model_states.pt"))
        if list(place.glob("*zero_pp_rank_*_optim_states.pt")) and _tensor_size(models) == 1:
            options.need_pickle(place)
            return Foreign(tensors=_of_zero(path, place, shapes), config=config)
        if any(file.name.startswith("zero_pp_rank") for file in models):
            raise CheckpointError(
                f"{place}: ZeRO 3 with {_tensor_size(models)} tensor-parallel ranks; make it universal first: "
                f"python -m deepspeed.checkpoint.ds_to_universal --input_folder {place} --output_folder OUT"
            )
        ranks = [load_pickle(file, options)["module"] for file in models]
        names = named(ranks[0], shapes)
        tensors = {
            name: LazyTensor(
                shapes[name],
                ranks[0][found].dtype,
                partial(joined, found, [rank[found] for rank in ranks], shapes[name]),
            )
            for name, found in names.items()
        }
        return Foreign(tensors=tensors, config=config)

    def write(self, foreign: Foreign, path: Path, options: Options) -> None:
        """Never."""
        raise CheckpointError("DeepSpeed's format is read, not written: write huggingface")


class DeepspeedUniversalFormat:
    """What `ds_to_universal` writes: `zero/NAME/fp32.pt`, whole tensors in fp32."""

    name = "deepspeed-universal"
    writes = False

    def detect(self, path: Path) -> str | None:
        """Folders by name."""
        place = _universal(path)
        found = list(place.glob("*/fp32.pt")) if place.is_dir() else []
        return f"DeepSpeed's universal checkpoint, {len(found)} tensors in fp32" if found else None

    def read(self, path: Path, options: Options) -> Foreign:
        """The fp32 weights."""
        config = options.need_config("DeepSpeed's")
        place = _universal(path)
        shapes = expected_shapes(Shape.of(config))
        names = named([folder.name for folder in place.iterdir() if folder.is_dir()], shapes)

        def load(name: str) -> torch.Tensor:
            content: Any = load_pickle(place / names[name] / "fp32.pt", options)
            return joined(name, [content["param"] if isinstance(content, dict) else content], shapes[name])

        options.need_pickle(place)
        tensors = {name: LazyTensor(shapes[name], torch.float32, partial(load, name)) for name in names}
        return Foreign(tensors=tensors, config=config, notes=("passed over the optimizer's state",))

    def write(self, foreign: Foreign, path: Path, options: Options) -> None:
        """Never."""
        raise CheckpointError("DeepSpeed's format is read, not written: write huggingface")


def _tag(path: Path) -> Path:
    latest = path / "latest"
    return path / latest.read_text().strip() if latest.is_file() else path


def _universal(path: Path) -> Path:
    for place in (path / "zero", _tag(path) / "zero"):
        if place.is_dir():
            return place
    latest = path / "latest_universal"
    return path / latest.read_text().strip() / "zero" if latest.is_file() else path / "zero"


def _tensor_size(models: list[Path]) -> int:
    return 1 + max(int(file.name.partition("mp_rank_")[2][:2]) for file in models)


def _of_zero(path: Path, place: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    from polyshard.adapters.deepspeed.compat import fp32_weights

    weights = fp32_weights(path if place != path else path.parent, place.name)
    names = named(weights, shapes)
    return {name: lazy(joined(found, [weights[found]], shapes[name])) for name, found in names.items()}
