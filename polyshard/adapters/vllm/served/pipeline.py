"""Pipeline stages of a served model: what each holds, and what passes between them."""

from __future__ import annotations

import torch.distributed as dist

from polyshard.adapters.vllm.compat import VllmConfig, get_pp_group, runs_pipelines
from polyshard.core.errors import RegistrationError
from polyshard.core.weight_table import WeightTable

HIDDEN = "hidden_states"  # what a stage hands to the next


def check_pipeline(name: str, vllm_config: VllmConfig) -> None:
    """Raise `RegistrationError` where vLLM itself would fail on several stages."""
    if vllm_config.parallel_config.pipeline_parallel_size > 1 and not runs_pipelines(vllm_config):
        raise RegistrationError(
            f"model {name!r}: vLLM 0.32 on CPU runs pipeline stages, its own models' too, only with "
            "enforce_eager=False and compilation_config={'mode': 2, 'backend': 'eager'}, and without "
            "TORCH_COMPILE_DISABLE"
        )


def stored_elsewhere(name: str, table: WeightTable) -> frozenset[str]:
    """Names, as stored, of the weights that other stages hold. A collective over the stages.

    Raises:
        RegistrationError: every stage holds the whole model.
    """
    group = get_pp_group()
    if group.world_size == 1:
        return frozenset()
    mine = {stored for entry in table.values() for stored in (*entry.checkpoint_names, *entry.tied_names)}
    stages: list[set[str]] = [set()] * group.world_size
    dist.all_gather_object(stages, mine, group=group.cpu_group)
    if all(stage == mine for stage in stages):
        raise RegistrationError(
            f"model {name!r}: its factory built the whole model on each of {len(stages)} pipeline stages: let it build "
            "polyshard.pipeline_stage(num_layers, parallel_context), as docs/how-to/bring-a-model.md shows, or serve "
            "it without pipeline parallel"
        )
    return frozenset(set().union(*stages) - mine)
