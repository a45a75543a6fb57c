"""Check that a vLLM, given as a wheel or a directory and never imported, has all that polyshard relies on.

    python tools/vllm_contract.py vllm-0.33.0-*.whl
    python tools/vllm_contract.py            # the installed one

Exit status 1, and a line for each thing that is missing, where it does not fit.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

COMPAT = Path(__file__).resolve().parents[1] / "polyshard" / "adapters" / "vllm"

# Parameters that we pass or are passed, by module and function.
SIGNATURES: dict[tuple[str, str], tuple[str, ...]] = {
    ("vllm.v1.engine.llm_engine", "LLMEngine.reset_prefix_cache"): ("reset_connector",),
    ("vllm.distributed.kv_transfer.kv_connector.factory", "KVConnectorFactory.get_connector_class"): (
        "kv_transfer_config",
    ),
    ("vllm.model_executor.layers.linear", "ColumnParallelLinear.__init__"): (
        *("input_size", "output_size", "bias", "gather_output", "return_bias", "quant_config", "prefix"),
    ),
    ("vllm.model_executor.layers.linear", "MergedColumnParallelLinear.__init__"): (
        *("input_size", "output_sizes", "bias", "return_bias", "quant_config", "prefix"),
    ),
    ("vllm.model_executor.layers.linear", "QKVParallelLinear.__init__"): (
        *("hidden_size", "head_size", "total_num_heads", "total_num_kv_heads", "bias", "return_bias", "prefix"),
    ),
    ("vllm.model_executor.layers.linear", "RowParallelLinear.__init__"): (
        *("input_size", "output_size", "bias", "input_is_parallel", "return_bias", "quant_config", "prefix"),
    ),
    ("vllm.model_executor.layers.linear", "QKVParallelLinear.weight_loader"): ("param", "loaded_weight"),
    ("vllm.model_executor.layers.linear", "MergedColumnParallelLinear.weight_loader"): ("param", "loaded_weight"),
    ("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbedding.__init__"): (
        *("num_embeddings", "embedding_dim"),
    ),
    ("vllm.model_executor.layers.vocab_parallel_embedding", "ParallelLMHead.__init__"): (
        *("num_embeddings", "embedding_dim", "bias"),
    ),
    ("vllm.model_executor.layers.layernorm", "RMSNorm.__init__"): ("hidden_size", "eps"),
    ("vllm.model_executor.layers.attention.attention", "Attention.__init__"): (
        *("num_heads", "head_size", "scale", "num_kv_heads", "cache_config", "quant_config"),
        *("per_layer_sliding_window", "prefix", "attn_backend"),
    ),
    ("vllm.model_executor.layers.attention.mla_attention", "MLAAttention.__init__"): (
        *("num_heads", "scale", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank"),
        *("kv_b_proj", "cache_config", "prefix"),
    ),
    ("vllm.model_executor.layers.attention.mla_attention", "MLAAttention.forward"): (
        *("q", "kv_c_normed", "k_pe", "output_shape"),
    ),
    ("vllm.model_executor.layers.attention.mla_attention", "MLAAttention.process_weights_after_loading"): (),
    ("vllm.v1.attention.selector", "get_attn_backend"): (
        *("head_size", "dtype", "kv_cache_dtype", "use_mla", "num_heads"),
    ),
    ("vllm.model_executor.layers.quantization.base_config", "QuantizeMethodBase.process_weights_after_loading"): (
        "layer",
    ),
    ("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm"): ("layer", "remove_weight"),
    ("vllm.model_executor.model_loader.reload.layerwise", "initialize_layerwise_reload"): ("model",),
    ("vllm.model_executor.model_loader.reload.layerwise", "finalize_layerwise_processing"): ("model", "model_config"),
    ("vllm.distributed.weight_transfer.factory", "WeightTransferEngineFactory.register_engine"): (),
    ("vllm.distributed.parallel_state", "GroupCoordinator.all_reduce"): ("input_",),
    ("vllm.distributed.parallel_state", "GroupCoordinator.all_gather"): ("input_", "dim"),
    ("vllm.distributed.parallel_state", "GroupCoordinator.reduce_scatter"): ("input_", "dim"),
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackend.get_supported_head_sizes"): (),
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackend.get_builder_cls"): (),
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionMetadataBuilder.build"): (
        *("common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackend.get_impl_cls"): (),
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl.forward"): (
        *("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
        *("output_scale", "output_block_scale"),
    ),
    ("vllm.model_executor.layers.vocab_parallel_embedding", "UnquantizedEmbeddingMethod.apply"): ("layer", "x", "bias"),
    ("vllm.model_executor.layers.linear", "UnquantizedLinearMethod.process_weights_after_loading"): ("layer",),
    ("vllm.platforms.interface", "Platform.is_zen_cpu"): (),
    ("vllm._custom_ops", "create_onednn_mm"): ("weight", "primitive_cache_size"),
    ("vllm._custom_ops", "onednn_mm"): ("dnnl_handler", "x", "bias"),
    ("vllm.model_executor.determinism.batch_invariant", "linear_batch_invariant"): ("input", "weight"),
    ("vllm.model_executor.determinism.batch_invariant", "rms_norm_batch_invariant"): ("input", "weight", "eps"),
    ("vllm.v1.attention.backends.cpu_attn", "_get_attn_isa"): ("dtype", "block_size", "head_size"),
    ("vllm._custom_ops", "cpu_attn_get_scheduler_metadata"): (
        *("num_reqs", "num_heads", "num_kv_heads", "head_dim", "seq_lens", "dtype", "query_start_loc"),
        *("causal", "sliding_window_size", "isa", "enable_kv_split"),
    ),
    ("vllm._custom_ops", "cpu_attn_reshape_and_cache"): (),
    ("vllm._custom_ops", "cpu_attention_with_kv_cache"): ("scale", "causal", "block_table", "softcap", "s_aux"),
    ("vllm._custom_ops", "rotary_embedding"): ("positions", "query", "key", "head_size", "cos_sin_cache", "is_neox"),
    ("vllm.v1.attention.backends.fa_utils", "get_flash_attn_version"): (
        *("requires_alibi", "head_size", "has_sinks", "requires_softcap"),
    ),
    ("vllm.model_executor.models.registry", "_ModelRegistry.register_model"): ("model_arch", "model_cls"),
    ("vllm.model_executor.models.utils", "WeightsMapper"): ("orig_to_new_prefix",),
    ("vllm.v1.engine.llm_engine", "LLMEngine.add_lora"): ("lora_request",),
    ("vllm.v1.engine.llm_engine", "LLMEngine.remove_lora"): ("lora_id",),
}

# What else is read, as it stands in the source.
TEXT: dict[str, tuple[str, ...]] = {
    "vllm/lora/request.py": ("lora_name: str", "lora_int_id: int", "lora_path: str", "load_inplace: bool"),
    "vllm/lora/worker_manager.py": ("or lora_request.load_inplace",),
    "vllm/plugins/__init__.py": ('"vllm.general_plugins"',),
    "vllm/distributed/parallel_state.py": (
        "global _WORLD, _NODE_COUNT",
        "self.ranks",
        "self.rank_in_group",
        "self.world_size",
        "self.device_group",
    ),
    "vllm/distributed/weight_transfer/factory.py": ("_registry",),
    "vllm/model_executor/layers/utils.py": ("cpu_linear",),
    "vllm/model_executor/layers/linear.py": ("_cpu_skip_gemm_dispatch", "self.tp_size"),
    "vllm/model_executor/layers/attention/mla_attention.py": ("self.kv_b_proj",),
    "vllm/config/model.py": ("def use_mla", "self.runner_type"),
    "vllm/config/speculative.py": ("method: ", '"ngram"', '"suffix"'),
    # Rows of hidden states are chosen for compute_logits, and nothing else is done with them.
    "vllm/v1/worker/gpu_model_runner.py": (
        "sample_hidden_states = hidden_states[logits_indices]",
        "self.model.compute_logits(sample_hidden_states)",
        "self.model.compute_logits(prompt_hidden_states)",
    ),
    # The same of the runner that GPUs have; and where it looks for what is compiled.
    "vllm/v1/worker/gpu/model_runner.py": (
        "sample_hidden_states = hidden_states[input_batch.logits_indices]",
        "self.model.compute_logits(sample_hidden_states)",
        "has_compiled_submodule(self.model)",
    ),
    "vllm/v1/worker/gpu/cudagraph_utils.py": ("def has_compiled_submodule", "for m in model.modules()"),
    "vllm/v1/engine/output_processor.py": ("request_states",),
    "vllm/v1/engine/core_client.py": ("engine_dead", "def shutdown", "self._finalizer", "outputs_queue"),
    "vllm/v1/engine/core.py": (
        "structured_output_manager.clear_backend",
        "model_executor.shutdown",
        "scheduler.shutdown",
    ),
    "vllm/model_executor/layers/activation.py": ("self.op = torch.ops._C.silu_and_mul\n",),
    "vllm/config/compilation.py": ("class CompilationMode", "cudagraph_mode: "),
    "vllm/envs.py": ("VLLM_CPU_ATTN_SPLIT_KV", "VLLM_BATCH_INVARIANT", "VLLM_MLA_DISABLE"),
    "vllm/v1/attention/backends/cpu_attn.py": (
        *("self.isa", "self.num_heads", "self.window_size", "self.head_dim", "layer.isa"),
        *("num_actual_tokens: int", "query_start_loc: torch.Tensor", "seq_lens: torch.Tensor"),
        *("block_table: torch.Tensor", "num_blocks, num_kv_heads, block_size, _ = kv_cache.size()"),
        *("self.scale = float(scale)", "self.sliding_window = -1", "self.logits_soft_cap = logits_soft_cap"),
        *("self.alibi_slopes = alibi_slopes", "self.sinks = sinks"),
    ),
    "vllm/v1/attention/backend.py": ("query_start_loc", "seq_lens", "block_table_tensor", "num_reqs"),
}

Read = Callable[[str], str | None]


def wheel_reader(path: Path) -> Read:
    """Reads files of a wheel."""
    archive = zipfile.ZipFile(path)
    names = set(archive.namelist())
    return lambda name: archive.read(name).decode() if name in names else None


def directory_reader(path: Path) -> Read:
    """Reads files of the directory that holds the package `vllm`."""
    return lambda name: (path / name).read_text() if (path / name).is_file() else None


class Sources:
    """Parsed modules of a vLLM."""

    def __init__(self, read: Read) -> None:
        self.read = read
        self._trees: dict[str, ast.Module | None] = {}

    def tree(self, module: str) -> ast.Module | None:
        """A module's syntax tree; None where there is no such file."""
        if module not in self._trees:
            stem = module.replace(".", "/")
            text = self.read(f"{stem}.py") or self.read(f"{stem}/__init__.py")
            self._trees[module] = None if text is None else ast.parse(text)
        return self._trees[module]

    def defines(self, module: str, name: str) -> bool:
        """Whether `from module import name` finds something: a definition, an import, a lazy name, a submodule."""
        tree = self.tree(module)
        if self.tree(f"{module}.{name}") is not None:
            return True
        if tree is None:
            return False
        if any(name in _bound(node) for node in ast.walk(tree)):
            return True
        stars = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.names[0].name == "*" and n.level == 1]
        return any(self.defines(f"{module}.{node.module}", name) for node in stars)

    def parameters(self, module: str, path: str) -> list[str] | None:
        """Names of a function's parameters, or a dataclass's fields; None where it is not defined there."""
        body = getattr(self.tree(module), "body", [])
        node: ast.AST | None = None
        for part in path.split("."):
            found = [n for n in _statements(body) if getattr(n, "name", None) == part]
            if not found:
                return None
            node, body = found[-1], getattr(found[-1], "body", [])
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = node.args
            return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        return [n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a body, and of the branches in it."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements([*node.body, *node.orelse])


def _bound(node: ast.AST) -> set[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name for alias in node.names}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    if isinstance(node, ast.Dict):  # the names of a lazy package
        return {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    return set()


def imports() -> Iterator[tuple[str, str]]:
    """Each name that polyshard imports from vLLM, with its module."""
    for path in sorted(COMPAT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    yield node.module or "", alias.name


def problems(read: Read) -> list[str]:
    """What is missing, one line each."""
    sources = Sources(read)
    found = [
        f"{module} has no {name}" for module, name in dict.fromkeys(imports()) if not sources.defines(module, name)
    ]
    for (module, path), wanted in SIGNATURES.items():
        known = sources.parameters(module, path)
        if known is None:
            found.append(f"{module} has no {path}")
        elif missing := [name for name in wanted if name not in known]:
            found.append(f"{module}.{path} takes no {', '.join(missing)}; it takes {', '.join(known)}")
    for name, wanted in TEXT.items():
        text = read(name)
        missing = [name] if text is None else [piece for piece in wanted if piece not in text]
        found += [f"{name}: no {piece}" for piece in missing]
    return found


def installed() -> Read:
    """Reads the installed vLLM."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        sys.exit("vLLM is not installed: name a wheel")
    return directory_reader(Path(spec.origin).parents[1])


def main(arguments: list[str]) -> int:
    """Check each wheel or directory that is named, or the installed vLLM."""
    readers = {a: wheel_reader(Path(a)) if a.endswith(".whl") else directory_reader(Path(a)) for a in arguments}
    failed = False
    for name, read in (readers or {"the installed vLLM": installed()}).items():
        found = problems(read)
        failed |= bool(found)
        count = len(set(imports())) + len(SIGNATURES) + len(TEXT)
        print(f"{name}: {f'{len(found)} of {count} are missing' if found else f'all {count} are there'}")
        for line in found:
            print(f"  {line}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
