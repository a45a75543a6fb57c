"""All code that depends on the version of Megatron-Core, for 0.16 to 0.19. Imported on first use of Megatron.

0.19 needs Python 3.12. Differences are detected from signatures, not from version numbers.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from polyshard.adapters.shared.optimizer_state import materialize
from polyshard.adapters.shared.quiet import printing_as_log
from polyshard.core.errors import AdapterError
from polyshard.core.parameter_groups import LR_SCALE, GroupSettings

logger = logging.getLogger(__name__)

CountedParts = Callable[[str, torch.Tensor, int], list[torch.Tensor]]

with warnings.catch_warnings(record=True) as _warned, printing_as_log(logger, "Megatron"):
    warnings.simplefilter("always")
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy as _cross_entropy
for _warning in _warned:
    logger.debug("Megatron warned at its import: %s", _warning.message)

__all__ = [
    "ColumnParallelLinear",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "OptimizerConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "base_optimizers",
    "count_gradients",
    "cuda_as_cpu",
    "current_device_as_cpu",
    "get_megatron_optimizer",
    "group_overrides",
    "layer_config",
    "optimizer_part",
    "sequence_parallel_state",
    "skip_infinite_gradients",
    "vocab_parallel_cross_entropy",
]


def layer_config(
    tensor_size: int, sequence_parallel: bool, initialize: bool, dtype: torch.dtype | None = None
) -> ModelParallelConfig:
    """What Megatron's layers and DDP read.

    Full weights are initialized on the CPU and then sliced, so they are equal at every tensor-parallel size. Megatron's
    initialization on the GPU does not guarantee this.
    """
    config: Any = ModelParallelConfig(
        tensor_model_parallel_size=tensor_size,
        sequence_parallel=sequence_parallel and tensor_size > 1,
        use_cpu_initialization=True,
        perform_initialization=initialize,
        params_dtype=dtype or torch.get_default_dtype(),
    )
    # DistributedDataParallel and the optimizer read two fields of TransformerConfig on any model's config.
    for name, value in (("num_moe_experts", None), ("calculate_per_token_loss", False)):
        if not hasattr(config, name):
            setattr(config, name, value)
    return config


def vocab_parallel_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the loss of each token. Before 0.19 Megatron's function takes no group and reads a global instead."""
    loss: Any = _cross_entropy
    if "tp_group" in inspect.signature(loss).parameters:
        return loss(logits, targets, tp_group=group)
    state: Any = parallel_state
    previous = state._TENSOR_MODEL_PARALLEL_GROUP
    state._TENSOR_MODEL_PARALLEL_GROUP = group
    try:
        return loss(logits, targets)
    finally:
        state._TENSOR_MODEL_PARALLEL_GROUP = previous


@dataclass(frozen=True, slots=True)
class OptimizerPart:
    """The tensor with the optimizer state of a parameter on this rank.

    Attributes:
        main: the tensor that the optimizer updates: the parameter, its fp32 copy, or a 1-D shard of either.
        start: the offset of the shard in the flattened parameter; None if `main` is replicated on every data-parallel
            rank.
    """

    main: torch.Tensor
    start: int | None


def base_optimizers(optimizer: Any) -> list[Any]:
    """Return the torch optimizers inside Megatron's, after creating their state if no step was taken.

    Megatron chains an optimizer of all weights but experts with one of the experts that are distributed over ranks.
    """
    bases = [holder.optimizer for holder in _holders(optimizer)]
    for base in bases:
        materialize(base)
    return bases


def loss_scale_state(optimizer: Any) -> dict[str, float]:
    """Return the loss scale of a float16 run, and the counts that decide when it changes."""
    state = _holders(optimizer)[0].grad_scaler.state_dict()
    counts = {"steps": state["growth_tracker"], "hysteresis": state["hysteresis_tracker"]}
    return {"factor": float(state["scale"]), **counts}


def load_loss_scale(optimizer: Any, saved: Mapping[str, float]) -> None:
    """Continue with the loss scale that `loss_scale_state` returned, or that of another library."""
    for holder in _holders(optimizer):
        scaler = holder.grad_scaler
        state = scaler.state_dict()
        scaler.load_state_dict(
            {
                "scale": torch.full_like(state["scale"], saved["factor"]),
                "growth_tracker": min(int(saved["steps"]), scaler.growth_interval - 1),
                "hysteresis_tracker": int(saved.get("hysteresis", state["hysteresis_tracker"])),
            }
        )


def _holders(optimizer: Any) -> list[Any]:
    """Return the optimizers with parameters: if experts alone are trained, the other one of the chain is a stub."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [holder for holder in chained if holder.optimizer is not None]


def group_overrides(settings: Mapping[torch.nn.Parameter, GroupSettings | None], lr: float) -> dict[Any, Any]:
    """Return `config_overrides` that give each parameter its learning rate and weight decay.

    Every parameter gets one, since Megatron would otherwise decide by its own rule which weights are decayed.

    Args:
        settings: of each parameter; None for one that is not trained.
        lr: learning rate of a parameter with scale 1.
    """

    def matches(wanted: GroupSettings) -> Callable[[torch.nn.Parameter], bool]:
        return lambda parameter: settings[parameter] == wanted

    overrides: dict[Any, Any] = {}
    for found in sorted({found for found in settings.values() if found is not None}, key=str):
        predicate = ParamPredicate(name=str(found), fn=matches(found))
        overrides[ParamKey(predicate=predicate)] = {
            "max_lr": lr * found.lr_scale,
            "start_wd": found.weight_decay,
            "end_wd": found.weight_decay,
            LR_SCALE: found.lr_scale,
        }
    return overrides


def optimizer_part(optimizer: Any, parameter: torch.nn.Parameter) -> OptimizerPart | None:
    """Return this rank's part of a parameter, or None if it has none (distrib_optimizer.py, 0.16.1)."""
    parts = (_part(holder, parameter) for holder in _holders(optimizer))
    return next((part for part in parts if part is not None), None)


def _part(holder: Any, parameter: torch.nn.Parameter) -> OptimizerPart | None:
    base = holder.optimizer
    if not hasattr(holder, "model_param_group_index_map"):
        main = getattr(parameter, "main_param", None)
        main = parameter if main is None else main
        return OptimizerPart(main, None) if main in base.state else None
    place = holder.model_param_group_index_map.get(parameter)
    if place is None:
        return None
    group, order = place
    run = holder._get_model_param_range_map(parameter)["param"]
    return OptimizerPart(base.param_groups[group]["params"][order], run.start)


def skip_infinite_gradients(optimizer: Any) -> None:
    """Let `step` leave the weights unchanged if the gradient norm is not finite, and return False.

    Megatron checks float16 alone (optimizer.py, 0.16.1: `prepare_grads` looks for infinities with a loss scale).
    """
    norm_of, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads
    finite = [True]

    def get_grad_norm() -> Any:
        norm = norm_of()
        finite[0] = math.isfinite(float(norm))
        return norm

    def step_with_ready_grads() -> bool:
        return update() if finite[0] else False

    optimizer.get_grad_norm = get_grad_norm
    optimizer.step_with_ready_grads = step_with_ready_grads


def count_gradients(optimizer: Any, named: Mapping[str, torch.nn.Parameter], parts: CountedParts) -> None:
    """Let Megatron's gradient norm count each logical element once.

    Megatron tells shards from copies by an attribute of the parameter (optimizer.py, get_main_grads_for_grad_norm), and
    no attribute says that a part of a parameter is a copy, such as a KV head that tensor-parallel ranks share.

    Args:
        optimizer: Megatron's.
        named: the model's parameters.
        parts: `(name, values, start) -> the views of a run of the flattened shard that count on this rank`.
    """

    def main_gradients(holder: Any, grad_norm_group: str | None = None) -> list[torch.Tensor]:
        assert grad_norm_group is None, "polyshard's models have no groups of their own"
        materialize(holder.optimizer)
        counted: list[torch.Tensor] = []
        for name, parameter in named.items():
            part = _part(holder, parameter)
            if part is not None and part.main.grad is not None:
                counted += parts(name, part.main.grad.reshape(-1), part.start or 0)
        return counted

    for holder in _holders(optimizer):
        # Renamed in Megatron-Core 0.19.
        known = [n for n in ("get_grads_for_grad_norm", "get_main_grads_for_grad_norm") if hasattr(holder, n)]
        if not known:
            raise AdapterError(
                f"the gradient norm of this Megatron-Core cannot be corrected: got {type(holder).__name__} without "
                "get_grads_for_grad_norm, expected the method. Install a supported version."
            )
        setattr(holder, known[0], partial(main_gradients, holder))


@contextlib.contextmanager
def current_device_as_cpu(device: torch.device) -> Iterator[None]:
    """Make `torch.cuda.current_device()` and `current_stream()` return the CPU's if a rank computes on the CPU.

    Sequence parallel and DDP allocate with `device=torch.cuda.current_device()`: tensor_parallel/mappings.py:91,181,
    tensor_parallel/layers.py:552, distributed/param_and_grad_buffer.py:806 (0.16.1). `test_megatron.py` fails
    when Megatron no longer needs this. Gradient synchronization reads the current stream, which raises in torch's CUDA
    builds without a GPU: distributed/param_and_grad_buffer.py:632 (0.19.2).
    """
    if device.type == "cuda":
        yield
        return
    cuda: Any = torch.cuda
    original = cuda.current_device, cuda.current_stream
    cuda.current_device = lambda: torch.device("cpu")  # callers accept a device in place of an index
    cuda.current_stream = lambda device=None: torch.cpu.current_stream()
    try:
        yield
    finally:
        cuda.current_device, cuda.current_stream = original


@contextlib.contextmanager
def sequence_parallel_state(device: torch.device) -> Iterator[None]:
    """Provide the global memory buffer that Megatron's layers gather into under sequence parallel."""
    state: Any = parallel_state
    made = state._GLOBAL_MEMORY_BUFFER is None
    if made:
        state._set_global_memory_buffer()
    try:
        with current_device_as_cpu(device):
            yield
    finally:
        if made:
            state._GLOBAL_MEMORY_BUFFER = None


class _CudaLiterals(TorchFunctionMode):
    """Replaces `device="cuda"` by the CPU, and reports CUDA types for CPU tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


@contextlib.contextmanager
def cuda_as_cpu(device: torch.device) -> Iterator[None]:
    """Make Megatron's optimizers work on a rank that computes on the CPU; wraps their construction and step.

    They contain literal `device='cuda'` and compare `tensor.type()` with 'torch.cuda.FloatTensor':
    optimizer/optimizer.py:473,481,690,907, optimizer/clip_grads.py:90,103,115,167, optimizer/distrib_optimizer.py:420
    (0.16.1). `tests/adapters/test_megatron.py` fails when Megatron no longer needs this.
    """
    if device.type == "cuda":
        yield
        return
    with current_device_as_cpu(device), _CudaLiterals():
        yield
