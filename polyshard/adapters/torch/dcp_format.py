"""torch's distributed checkpoints (`.metadata` and `__R_N.distcp`) of a plain module."""

from __future__ import annotations

from pathlib import Path

from polyshard.adapters.shared.distributed_checkpoint import stored_tensors
from polyshard.core.errors import CheckpointError
from polyshard.core.foreign import Foreign, Options, Shape, expected_shapes, named


class DcpFormat:
    """A module's `state_dict`, saved by `torch.distributed.checkpoint.save`."""

    name = "torch-dcp"
    writes = False

    def detect(self, path: Path) -> str | None:
        """`.metadata` beside `.distcp` files, and none of Megatron's files."""
        if not (path / ".metadata").is_file() or (path / "metadata.json").is_file():
            return None
        return f"torch's distributed checkpoint in {len(list(path.glob('*.distcp')))} files"

    def read(self, path: Path, options: Options) -> Foreign:
        """The tensors that the configuration asks for; others, such as an optimizer's, are passed over."""
        config = options.need_config("torch's distributed")
        stored = stored_tensors(path, options)
        names = named(stored, expected_shapes(Shape.of(config)))
        tensors = {name: stored[source] for name, source in names.items()}
        left = sorted(set(stored) - set(names.values()))
        notes = (f"passed over {len(left)} tensors that are no weights, such as {left[0]}",) if left else ()
        return Foreign(tensors=tensors, config=config, notes=notes)

    def write(self, foreign: Foreign, path: Path, options: Options) -> None:
        """Never."""
        raise CheckpointError("torch's distributed format is read, not written: write huggingface, which it reads too")
