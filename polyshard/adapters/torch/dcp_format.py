"""torch's distributed checkpoints (`.metadata` and `__R_N.distcp`) of a plain module."""

from __future__ import annotations

import re
from pathlib import Path

from polyshard.adapters.shared.distributed_checkpoint import stored_tensors
from polyshard.adapters.shared.hugging_face_names import match
from polyshard.config.decoder_spec import DecoderSpec, expected_shapes
from polyshard.convert.accounting import check_shapes
from polyshard.convert.format import Foreign, Independent, Options
from polyshard.core.errors import CheckpointError

# The usual first part of names that are not weights, as in save({"model": ..., "optimizer": ...}).
TRAINING_STATE = re.compile(
    r"^(app\.)?(optim|optimizer|optimizers|optim_state|lr_scheduler|scheduler|dataloader|train_state|rng|rng_state)(\.|$)"
)


class DcpFormat:
    """The `state_dict` of a module, saved by `torch.distributed.checkpoint.save`."""

    name = "torch-dcp"
    writes = False

    def detect(self, path: Path) -> str | None:
        """Detect `.metadata` without Megatron's `metadata.json`."""
        if not (path / ".metadata").is_file() or (path / "metadata.json").is_file():
            return None
        return f"torch's distributed checkpoint in {len(list(path.glob('*.distcp')))} files"

    def read(self, path: Path, options: Options) -> Foreign:
        """Read the weights of the configuration; optimizer state is skipped, and other tensors are an error."""
        config = options.need_config("torch's distributed", path)
        spec = DecoderSpec.of(config)
        stored = stored_tensors(path, options)
        left = sorted(name for name in stored if TRAINING_STATE.search(name))
        weights = set(stored) - set(left)
        names, notes = match(path, weights, spec, lambda name: stored[name].load())
        tensors = {name: stored[found] for name, found in names.items()}
        check_shapes(path, {name: tensor.shape for name, tensor in tensors.items()}, expected_shapes(spec))
        if left:
            notes += (f"left out {len(left)} tensors of the training state, such as {left[0]}",)
        return Foreign(tensors=tensors, config=config, companions=path, notes=notes)

    def write(self, foreign: Foreign, path: Path, options: Options) -> tuple[str, ...]:
        """Raise `CheckpointError`: this format is only read."""
        raise CheckpointError("torch's distributed format is read, not written: write huggingface instead")

    def independent(self, path: Path, options: Options) -> Independent:
        """Load all tensors with torch's own code, under their saved names."""
        stored = stored_tensors(path, options)
        state = {name: entry.load() for name, entry in stored.items() if not TRAINING_STATE.search(name)}
        return Independent(by="torch.distributed.checkpoint", state=state)
