"""All of vLLM that polyshard relies on; written for 0.32 and 0.33. A new vLLM is met by changing this file alone.

Imported on first use of vLLM. `tools/vllm_contract.py` names each import and signature, and checks a new version's
wheel.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from vllm import ModelRegistry, envs
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.distributed import get_pp_group, get_tp_group, get_world_group, parallel_state
from vllm.distributed.utils import get_pp_indices
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor import model_loader
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import (
    DEFAULT_VOCAB_PADDING_SIZE,
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.utils import _MODEL_ARCH_BY_HASH
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.engine.exceptions import EngineDeadError

from polyshard.adapters.vllm.paging import CPU_BLOCK, Blocks, cut_queries
from polyshard.attention.kernels.protocol import AttentionCall
from polyshard.core.errors import ConfigurationError

__all__ = [
    "DEFAULT_VOCAB_PADDING_SIZE",
    "Attention",
    "BaseModelLoader",
    "CPUAttentionBackend",
    "CPUAttentionBackendImpl",
    "CPUAttentionMetadataBuilder",
    "ColumnParallelLinear",
    "CompilationMode",
    "IntermediateTensors",
    "LocalWorker",
    "MergedColumnParallelLinear",
    "ParallelLMHead",
    "ParamMeta",
    "PinnedBackend",
    "QKVParallelLinear",
    "QuantizeMethodBase",
    "RMSNorm",
    "RowParallelLinear",
    "SupportsLoRA",
    "SupportsPP",
    "UnquantizedEmbeddingMethod",
    "UnquantizedLinearMethod",
    "VllmConfig",
    "VocabParallelEmbedding",
    "WeightSource",
    "WeightTransferEngine",
    "WeightTransferInitInfo",
    "WeightTransferUpdateInfo",
    "WeightsMapper",
    "absorb_latents",
    "base_layer",
    "batch_invariant",
    "begin_reload",
    "cpu_attention",
    "cpu_head_size",
    "cpu_head_sizes",
    "cpu_packed_product",
    "cuda_flash_attention",
    "cuda_flash_version",
    "end_engine",
    "end_reload",
    "ends_with_engine",
    "engine_dtype",
    "engine_is_dead",
    "get_pp_group",
    "get_pp_indices",
    "get_tp_group",
    "get_world_group",
    "has_packed_product",
    "has_product_of_processor",
    "is_batch_invariant",
    "is_eager",
    "latents_lack",
    "load_into",
    "local_worker",
    "model_dtype",
    "operator_rms_norm",
    "operator_takes_norm",
    "process_after_loading",
    "register_class",
    "register_loader",
    "register_transfer",
    "rotate_in_place",
    "runs_pipelines",
    "source_metadata",
    "support_torch_compile",
    "takes_rotary",
    "unfinished_requests",
    "uses_latents",
    "vllm_product",
]


# vLLM 0.33 asks a WeightSource for `metadata` as a cached property and for `iter_full()`; 0.32 calls both.
source_metadata: Any = cached_property if hasattr(WeightSource, "iter_full") else lambda function: function


def cpu_head_sizes() -> tuple[int, ...]:
    """Head dimensions of vLLM's CPU attention."""
    return tuple(CPUAttentionBackend.get_supported_head_sizes())


def cpu_head_size(needed: int) -> int | None:
    """The smallest of them that holds a head; None where none does."""
    return min((size for size in cpu_head_sizes() if size >= needed), default=None)


def cpu_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, pinned: bool = False
) -> torch.Tensor:
    """vLLM's CPU attention of packed sequences, through a paged cache that lasts for the call.

    Keys are not split over threads (VLLM_CPU_ATTN_SPLIT_KV=0 gives the same in an engine). `pinned`: queries are
    attended in pieces that are alike in every batch, and a token's output depends on its sequence alone.

    Source: v1/attention/backends/cpu_attn.py, CPUAttentionBackendImpl.forward.
    """
    from vllm import _custom_ops as operators

    spec, heads, size = call.spec, k.shape[1], k.shape[2]
    blocks = Blocks.of(call.keys.host, CPU_BLOCK)
    cache = k.new_zeros(blocks.count, heads, 2 * CPU_BLOCK, size)
    keys, values = cache.chunk(2, dim=2)
    kind = cpu_isa(q.dtype, size)
    operators.cpu_attn_reshape_and_cache(k.contiguous(), v.contiguous(), keys, values, blocks.slots, kind)
    window = -1 if spec.sliding_window is None else spec.sliding_window
    bounds, seen, table = call.queries.host, call.keys.host.diff(), blocks.table
    if pinned:
        bounds, seen, table = cut_queries(bounds, seen, table, queries_of_a_piece(kind, q.shape[1] // heads))
    bounds, seen, table = bounds.to(torch.int32), seen.to(torch.int32), table.to(torch.int32)
    plan = operators.cpu_attn_get_scheduler_metadata(
        len(seen), q.shape[1], heads, size, seen, q.dtype, bounds, spec.causal, window, kind, False
    )
    sinks = call.sinks
    if sinks is not None and sinks.dtype not in (torch.bfloat16, torch.float32):
        sinks = sinks.float()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    operators.cpu_attention_with_kv_cache(
        q.contiguous(),
        keys,
        values,
        out,
        bounds,
        seen,
        spec.scale,
        spec.causal,
        call.alibi_slopes,
        window,
        table,
        spec.softcap or 0.0,
        plan,
        sinks,
    )
    return out


def cpu_isa(dtype: torch.dtype, head_dim: int) -> str:
    """The instruction set of vLLM's CPU attention on this machine."""
    return cpu_attn._get_attn_isa(dtype, CPU_BLOCK, head_dim, "auto")


# Query heads that the kernel holds in registers at a time (0.32, csrc/cpu/cpu_attn_*.hpp, MaxQHeadNumPerIteration).
# Up to so many, the number of keys of a tile is one constant; beyond, it follows from the number of queries, which
# follows from the batch and the threads.
_HEADS_AT_A_TIME = {"vec": 8, "vec16": 16, "amx": 32}


def queries_of_a_piece(isa: str, heads_per_kv: int) -> int:
    """How many query tokens the kernel takes at a time.

    Raises:
        ConfigurationError: nothing is known of this instruction set.
    """
    if isa not in _HEADS_AT_A_TIME:
        raise ConfigurationError(
            f"exact mode knows vLLM's CPU attention for {', '.join(_HEADS_AT_A_TIME)}, this machine has {isa!r}: "
            "its kernel would have to be looked at first"
        )
    heads = _HEADS_AT_A_TIME[isa]
    return heads // heads_per_kv if heads % heads_per_kv == 0 else heads  # else each head goes by itself


class PinnedMetadataBuilder(CPUAttentionMetadataBuilder):
    """Hands vLLM's kernel a batch as pieces of queries that are alike in every batch, and never splits keys.

    Why: `_HEADS_AT_A_TIME`, and docs/exactness.md. A piece is a sequence to the kernel, over the same cache blocks.
    """

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """vLLM's metadata of the pieces."""
        common = common_attn_metadata
        bounds, seen, table = cut_queries(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            queries_of_a_piece(self.isa, self.num_heads // self.num_kv_heads),
        )
        pieces = replace(common, query_start_loc=bounds, seq_lens=seen, block_table_tensor=table, num_reqs=len(seen))
        found = super().build(common_prefix_len, pieces, fast_build)
        if envs.VLLM_CPU_ATTN_SPLIT_KV:
            from vllm import _custom_ops as operators

            dtype: Any = self.dtype
            found.scheduler_metadata = operators.cpu_attn_get_scheduler_metadata(
                len(seen),
                self.num_heads,
                self.num_kv_heads,
                self.head_dim,
                seen,
                dtype,
                bounds,
                found.causal,
                self.window_size,
                self.isa,
                False,
            )
        return found


class PinnedBackend(CPUAttentionBackend):
    """vLLM's CPU attention backend with that builder, for `Attention(attn_backend=...)`."""

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """See the class."""
        return PinnedMetadataBuilder


def is_eager(vllm_config: VllmConfig) -> bool:
    """Whether the model's operators run one by one, as they are written."""
    return vllm_config.compilation_config.mode == CompilationMode.NONE


def cpu_packed_product(weight: torch.Tensor) -> Any:
    """vLLM's packed CPU matrix product `x -> x Wᵀ` of oneDNN, whatever kernel an engine would choose for the size."""
    from vllm import _custom_ops as operators

    handler = operators.create_onednn_mm(weight.detach().contiguous().t(), 32)
    return partial(operators.onednn_mm, handler, bias=None)


def has_packed_product(dtype: torch.dtype) -> bool:
    """Whether `cpu_packed_product` takes a dtype on this processor."""
    try:
        cpu_packed_product(torch.zeros(32, 32, dtype=dtype))
    except RuntimeError:  # oneDNN has no primitive
        return False
    return True


def batch_invariant() -> Any:
    """vLLM's batch-invariant CUDA operators."""
    from vllm.model_executor.determinism import batch_invariant

    return batch_invariant


def is_batch_invariant() -> bool:
    """Whether vLLM was started with VLLM_BATCH_INVARIANT=1."""
    return bool(envs.VLLM_BATCH_INVARIANT)


ROTARY_MULTIPLE = 16  # rotary dims of whole vectors; at others the operator writes past the end on CPU (0.32.0)


def takes_rotary(q: torch.Tensor, cos: torch.Tensor) -> bool:
    """Whether the operator below takes heads and cosines like these: one rule for trainer and engine in exact mode."""
    return 2 * cos.shape[-1] % ROTARY_MULTIPLE == 0 and cos.dtype == q.dtype


def rotate_in_place(rows: torch.Tensor, q: torch.Tensor, k: torch.Tensor, head_dim: int, table: torch.Tensor) -> None:
    """vLLM's rotary operator, halves turned against each other (neox style).

    Args:
        rows: int64 `[tokens]`, into `table`.
        q: `[tokens, heads * head_dim]`, a view of the memory to be changed; a token's heads lie together.
        k: `[tokens, kv_heads * head_dim]`.
        head_dim: size of a head.
        table: `[rows, rotary_dim]`, cosines before sines, in the dtype of `q`.
    """
    from vllm import _custom_ops as operators

    operators.rotary_embedding(rows, q, k, head_dim, table, True)


def operator_takes_norm(x: torch.Tensor) -> bool:
    """Whether the operator below takes this size on CPU: whole vectors."""
    return x.shape[-1] % 8 == 0


def operator_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """vLLM's norm in one operator; its own layer runs one torch operation after another on CPU."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ops._C.rms_norm(out, x.contiguous(), weight, eps)
    return out


def vllm_product(layer: Any, remove_weight: bool) -> Any:
    """Pack `layer.weight` for vLLM's CPU matrix product, and give that product `(x, weight, bias)`."""
    dispatch_cpu_unquantized_gemm(layer, remove_weight=remove_weight)
    return layer.cpu_linear


def has_product_of_processor(dtype: torch.dtype) -> bool:
    """Whether vLLM's CPU product has instructions for this dtype that the compiled one has not, or AMD's zentorch."""
    if current_platform.is_zen_cpu() and hasattr(torch.ops.zentorch, "zentorch_linear_unary"):
        return True
    able = torch.cpu.get_capabilities()
    wanted = {torch.bfloat16: ("amx_bf16",), torch.float16: ("avx512_fp16", "amx_fp16")}
    return any(able.get(name, False) for name in wanted.get(dtype, ()))


def cuda_flash_attention() -> Any:
    """vLLM's bundled flash-attention: forward alone."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    return flash_attn_varlen_func


def cuda_flash_version(head_dim: int) -> int:
    """Which of its versions an engine takes on this device."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    return get_flash_attn_version(head_size=head_dim) or 2


def uses_latents(vllm_config: VllmConfig) -> bool:
    """Whether vLLM lays out its cache for latent attention: it knows the config's `model_type` for one that has it."""
    return bool(vllm_config.model_config.use_mla)


def latents_lack(vllm_config: VllmConfig, size: int, num_heads: int) -> str | None:
    """Why vLLM has no kernel for latents and rotated keys of `size` together on this platform; None where it has."""
    cache = vllm_config.cache_config.cache_dtype
    try:
        backend = get_attn_backend(size, model_dtype(vllm_config), cache, use_mla=True, num_heads=num_heads)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    sizes = backend.get_supported_head_sizes()
    return f"{backend.get_name()} has {', '.join(map(str, sizes))}" if sizes and size not in sizes else None


# The shard ids that vLLM's fused layers' weight loaders take, by segment.
QKV_SHARD_IDS = ("q", "k", "v")


def process_after_loading(module: Any) -> None:
    """vLLM's own work on a layer whose weights are loaded (packed CPU copies); none where the layer is not vLLM's."""
    method = getattr(module, "quant_method", None)
    if isinstance(method, QuantizeMethodBase):
        method.process_weights_after_loading(module)


def base_layer(module: nn.Module) -> nn.Module:
    """The layer that holds the weights, out of vLLM's wrapper for LoRA."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def absorb_latents(module: nn.Module) -> None:
    """An MLA layer keeps its expansion's weights in the form of its decode: make that anew; none for other layers."""
    if isinstance(module, MLAAttention):
        module.process_weights_after_loading(module.kv_b_proj.params_dtype)


def begin_reload(model: nn.Module, vllm_config: VllmConfig) -> None:
    """vLLM's layerwise reload: parameters become meta tensors that their loaders fill."""
    with set_current_vllm_config(vllm_config):
        initialize_layerwise_reload(model)


def load_into(model: Any, vllm_config: VllmConfig, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
    """The model's own loading; gives the names of the parameters that were loaded, where the model tells."""
    with set_current_vllm_config(vllm_config):
        return model.load_weights(weights)


def end_reload(model: nn.Module, vllm_config: VllmConfig) -> None:
    """End vLLM's layerwise reload, and pack shared weights again.

    vLLM packs a weight for each layer that uses it, but reloads it for the first alone: on CPU a head that is tied to
    the embedding would go on with the old weights (0.32.0, model_executor/model_loader/reload/layerwise.py).
    """
    with set_current_vllm_config(vllm_config):
        finalize_layerwise_reload(model, vllm_config.model_config)
        users: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.numel():
                users.setdefault(weight.data_ptr(), []).append(module)
        for sharing in users.values():
            if len(sharing) > 1:
                for module in sharing:
                    process_after_loading(module)


@dataclass(frozen=True, slots=True)
class LocalWorker:
    """The worker of an engine that runs in this very process."""

    model: nn.Module
    vllm_config: VllmConfig


def local_worker(llm: Any) -> LocalWorker | None:
    """An engine's worker, where it is in this process (one process, or torchrun's external launcher); else None."""
    executor = getattr(llm.llm_engine, "model_executor", None)
    worker = getattr(executor, "driver_worker", None)
    worker = getattr(worker, "worker", worker)
    runner = getattr(worker, "model_runner", None)
    if runner is None:
        return None
    return LocalWorker(runner.get_model(), llm.llm_engine.vllm_config)


def runs_pipelines(vllm_config: VllmConfig) -> bool:
    """Whether vLLM makes the buffers between pipeline stages: on CPU it does so only in the run that compiles.

    Source: v1/worker/cpu_worker.py and gpu_model_runner.py, `intermediate_tensors`, 0.32.
    """
    on_cpu = vllm_config.device_config.device_type == "cpu"
    return not (on_cpu and vllm_config.compilation_config.mode == CompilationMode.NONE)


def engine_is_dead(llm: Any) -> bool:
    """Whether the processes of an engine that has its own are gone.

    Source: v1/engine/core_client.py, BackgroundResources, 0.32.
    """
    resources = getattr(llm.llm_engine.engine_core, "resources", None)
    return bool(getattr(resources, "engine_dead", False))


@contextlib.contextmanager
def ends_with_engine(llm: Any) -> Iterator[None]:
    """Around a call that waits for an engine's outputs: an engine that was killed ends it with `EngineDeadError`.

    vLLM notices the death in a thread of its own, but leaves the call waiting for ever (0.32, v1/engine/core_client.py,
    SyncMPClient.get_output).
    """
    waiting = getattr(llm.llm_engine.engine_core, "outputs_queue", None)
    if waiting is None:  # an engine in this process
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            if engine_is_dead(llm):
                waiting.put_nowait(EngineDeadError())
                return

    thread = threading.Thread(target=watch, name="polyshard-engine-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def end_engine(llm: Any, keep_world: bool) -> None:
    """End an engine: its processes, or in this process its worker.

    vLLM's own shutdown ends with torch's default process group, whoever made it (0.32, distributed/parallel_state.py,
    destroy_distributed_environment). `keep_world`: an engine in this process leaves it; its own groups go.
    """
    client = llm.llm_engine.engine_core
    core = getattr(client, "engine_core", None)
    if core is None or not keep_world:
        client.shutdown()
        return
    if client._finalizer.detach() is None:
        return
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
    envs.disable_envs_cache()
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None


def model_dtype(vllm_config: Any) -> torch.dtype:
    """Of a model's weights, once vLLM has read its config."""
    return vllm_config.model_config.dtype


def engine_dtype(llm: Any) -> torch.dtype:
    """Of an engine's weights."""
    return model_dtype(llm.llm_engine.vllm_config)


def unfinished_requests(llm: Any) -> list[str]:
    """Ids of the requests that an engine has not finished."""
    return list(llm.llm_engine.output_processor.request_states)


def register_class(name: str, model_class: type[nn.Module]) -> None:
    """Put a class into vLLM's registry; one of the same name gives way, also where an engine has looked it up already.

    A class object: the lazy string form costs a subprocess, and caches stale flags. vLLM keeps the class that it found
    for a checkpoint (0.32, model_executor/model_loader/utils.py), and would go on with the one registered before.
    """
    ModelRegistry.register_model(name, model_class)
    for key in [key for key, (_, found) in _MODEL_ARCH_BY_HASH.items() if found == name]:
        del _MODEL_ARCH_BY_HASH[key]


def register_loader(load_format: str, loader: type[BaseModelLoader]) -> None:
    """Make a way of loading known to vLLM in this process; again is as once."""
    if load_format not in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        model_loader.register_model_loader(load_format)(loader)


def register_transfer(name: str, module: str, attribute: str) -> None:
    """Make a weight transfer backend known to vLLM in this process; again is as once."""
    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, module, attribute)
