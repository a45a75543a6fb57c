"""Pipeline stages of a served model: checks, the tensor passed between stages, and the weights of other stages."""

from __future__ import annotations

import torch.distributed as dist

from polyshard.adapters.vllm.compat import VllmConfig, get_pp_group, runs_pipelines
from polyshard.core.errors import RegistrationError
from polyshard.core.weight_table import WeightTable

HIDDEN = "hidden_states"  # name of the tensor that a stage sends to the next


def check_pipeline(name: str, vllm_config: VllmConfig) -> None:
    """Raise `RegistrationError` if vLLM itself cannot run several stages with this configuration."""
    if vllm_config.parallel_config.pipeline_parallel_size > 1 and not runs_pipelines(vllm_config):
        raise RegistrationError(
            f"model {name!r}: pipeline stages on CPU are unsupported by vLLM 0.32 in eager mode, also for its own "
            "models. Set enforce_eager=False and compilation_config={'mode': 2, 'backend': 'eager'}, and unset "
            "TORCH_COMPILE_DISABLE"
        )


def names_on_other_stages(name: str, table: WeightTable) -> frozenset[str]:
    """Return the stored names of the weights on other stages. A collective over the stages.

    Raises:
        RegistrationError: every stage holds the full model.
    """
    group = get_pp_group()
    if group.world_size == 1:
        return frozenset()
    mine = {stored for entry in table.values() for stored in (*entry.checkpoint_names, *entry.tied_names)}
    stages: list[set[str]] = [set()] * group.world_size
    dist.all_gather_object(stages, mine, group=group.cpu_group)
    if all(stage == mine for stage in stages):
        raise RegistrationError(
            f"model {name!r}: its factory built the full model on each of {len(stages)} pipeline stages. Build only "
            "the layers of polyshard.pipeline_stage(num_layers, parallel_context), as docs/how-to/bring-a-model.md "
            "shows, or serve it without pipeline parallel"
        )
    return frozenset(set().union(*stages) - mine)


def any_stage(is_true: bool) -> bool:
    """Return whether something is true of any pipeline stage. A collective over the stages."""
    group = get_pp_group()
    if group.world_size == 1:
        return is_true
    found = [False] * group.world_size
    dist.all_gather_object(found, is_true, group=group.cpu_group)
    return any(found)
