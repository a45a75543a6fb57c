"""The states of all ranks' random generators in a training state."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from polyshard.checkpoint.files import TensorReader
from polyshard.core.context import ParallelContext
from polyshard.core.parallel_layout import ParallelLayout
from polyshard.core.ranks import Ranks
from polyshard.training import generators

logger = logging.getLogger(__name__)

RANDOM = "random"  # the file's name


def sizes(layout: ParallelLayout) -> dict[str, int]:
    """Return the sizes that decide which random states a rank continues from."""
    return {axis: getattr(layout, axis) for axis in ("tensor", "data", "context", "pipeline")}


def random_states(ranks: Ranks) -> dict[str, torch.Tensor]:
    """Return the states of all ranks' generators, under names that begin with the rank. A collective."""
    states = ranks.gather(generators.all_states())
    return {f"{rank:05d}.{name}": value for rank, state in enumerate(states) for name, value in state.items()}


def restore_random(folder: Path, saved: Mapping[str, Any], context: ParallelContext, ranks: Ranks) -> bool:
    """Restore the random generators; return False if this rank's states could not be restored.

    At the sizes of the save every rank takes its own states. At other tensor-parallel, context-parallel or pipeline
    sizes it takes those of the first rank with its data-parallel position; with `polyshard.manual_seed` these were
    equal over the tensor and context axes. A data-parallel position that was not saved, and a later pipeline stage,
    get a seed from the first rank's next draw and their own number.
    """
    now, reader = sizes(context.layout), TensorReader(folder, stem=RANDOM)
    saved = {"pipeline": 1, **saved}  # older states have no pipeline
    same = saved == now
    data, stage = context.axis("data").rank, context.axis("pipeline").rank
    known = data < saved["data"]
    source = ranks.rank
    if not same:
        layout = ParallelLayout(**saved)
        source = layout.groups("data")[0][data if known else 0]  # the other coordinates of the first group are all 0
        if ranks.rank == 0:
            logger.warning(
                "random states were saved at tensor %s, data %s, context %s, pipeline %s: each data-parallel rank "
                "takes those of the first rank at its position, so the run differs from an uninterrupted one",
                *(saved[name] for name in ("tensor", "data", "context", "pipeline")),
            )
    prefix = f"{source:05d}."
    generators.restore({n.removeprefix(prefix): reader.tensor(n) for n in reader.where if n.startswith(prefix)})
    if not known or (stage and not same):
        seed = int(torch.randint(2**62, (), device="cpu"))
        generators.seed_all(generators.mixed(seed, data + now["data"] * stage))
    return known
