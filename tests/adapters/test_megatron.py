"""What is peculiar to Megatron-Core."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import polyshard as ps
from polyshard.testing import run_ranks

SCHEDULE = {
    "forward_step_func", "data_iterator", "model", "num_microbatches", "seq_length", "micro_batch_size",
    "forward_only", "p2p_communicator", "pg_collection",
}  # fmt: skip
# What polyshard passes and reads, by file of megatron/core; the same for 0.16 and 0.19.
RELIED_ON = {
    "tensor_parallel/layers.py": {
        "ColumnParallelLinear.__init__": {"config", "init_method", "bias", "gather_output", "tp_group"},
        "RowParallelLinear.__init__": {
            "config", "init_method", "bias", "input_is_parallel", "skip_bias_add", "tp_group",
        },
        "VocabParallelEmbedding.__init__": {"init_method", "reduce_scatter_embeddings", "config", "tp_group"},
    },
    "tensor_parallel/cross_entropy.py": {"vocab_parallel_cross_entropy": {"vocab_parallel_logits", "target"}},
    "distributed/distributed_data_parallel.py": {
        "DistributedDataParallel.__init__": {"config", "ddp_config", "module", "pg_collection"},
        "DistributedDataParallel.zero_grad_buffer": set(),
        "DistributedDataParallel.no_sync": set(),
        "DistributedDataParallel.finish_grad_sync": set(),
    },
    "optimizer/__init__.py": {
        "get_megatron_optimizer": {"use_gloo_process_groups", "pg_collection", "config_overrides"},
    },
    "parallel_state.py": {"_set_global_memory_buffer": set()},
    "pipeline_parallel/p2p_communication.py": {"P2PCommunicator.__init__": {"pp_group", "config"}},
    "pipeline_parallel/schedules.py": {
        "get_forward_backward_func": {"pp_size", "vp_size"},
        "forward_backward_pipelining_without_interleaving": SCHEDULE,
        "forward_backward_pipelining_with_interleaving": SCHEDULE,
    },
}  # fmt: skip
FIELDS = {
    "model_parallel_config.py": {
        "tensor_model_parallel_size", "sequence_parallel", "use_cpu_initialization", "perform_initialization",
        "params_dtype", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
        "microbatch_group_size_per_vp_stage", "pipeline_dtype", "overlap_p2p_comm", "batch_p2p_comm", "batch_p2p_sync",
        "deallocate_pipeline_outputs", "variable_seq_lengths", "finalize_model_grads_func", "no_sync_func",
        "grad_scale_func",
    },
    "distributed/distributed_data_parallel_config.py": {
        "grad_reduce_in_fp32", "overlap_grad_reduce", "use_distributed_optimizer",
    },
    "optimizer/optimizer_config.py": {
        "optimizer", "lr", "adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "clip_grad", "params_dtype",
        "use_distributed_optimizer", "sgd_momentum", "predicate", "fn",
    },
    "optimizer_param_scheduler.py": {"max_lr", "start_wd", "end_wd"},
    "process_groups_config.py": {
        "tp", "pp", "mp", "dp", "dp_cp", "expt_dp", "intra_dp_cp", "intra_dist_opt", "embd", "pos_embd",
    },
    "parallel_state.py": {"_TENSOR_MODEL_PARALLEL_GROUP", "_GLOBAL_MEMORY_BUFFER"},
}  # fmt: skip
NEWEST = "0.19.2"  # needs Python 3.12, so it is read and not run


@pytest.fixture(scope="module", params=["installed", NEWEST])
def megatron_source(request, tmp_path_factory):
    """The folder megatron/core of the installed version, and of the newest one's wheel."""
    if request.param == "installed":
        import megatron.core

        return Path(megatron.core.__file__).parent
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    wanted = ["--python-version", "3.12", "--dest", str(folder), f"megatron-core=={NEWEST}"]
    subprocess.run([*pip, *wanted], check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder / "megatron" / "core"


def signatures(source):
    """Names of parameters of every function and method, and every name that a module or class body sets."""
    functions, names = {}, set()

    def walk(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                arguments = node.args
                functions[prefix + node.name] = {a.arg for a in (*arguments.args, *arguments.kwonlyargs)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.Assign):
                names.update(t.id for t in node.targets if isinstance(t, ast.Name))

    walk(ast.parse(source).body, "")
    return functions, names


def test_megatron_has_what_is_relied_on(megatron_source):
    for file, functions in RELIED_ON.items():
        known, _ = signatures((megatron_source / file).read_text())
        for name, parameters in functions.items():
            assert name in known, f"megatron/core/{file} has no {name}: mend compat.py"
            assert parameters <= known[name], f"{name} no longer takes {parameters - known[name]}: mend compat.py"
    for file, fields in FIELDS.items():
        _, names = signatures((megatron_source / file).read_text())
        assert fields <= names, f"megatron/core/{file} has no {fields - names}: mend compat.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shim does nothing where there is CUDA")
def test_the_shims_are_still_needed():
    """Without them: an error for want of CUDA. When this fails, drop the shim that it names."""
    messages = run_ranks(without_shims, 2)[0]
    assert "CUDA" in messages["current_device_as_cpu"], messages
    assert "CUDA" in messages["cuda_as_cpu"], messages


def without_shims():
    import contextlib

    from polyshard.adapters.megatron import compat

    messages, original = {}, torch.cuda.current_device
    context = ps.initialize("megatron", tensor=2, sequence_parallel=True, timeout=30)
    layer = ps.column_parallel(8, 8, context)
    shimmed, torch.cuda.current_device = torch.cuda.current_device, original
    try:
        layer(torch.ones(4, 8))
    except (AssertionError, RuntimeError) as error:
        messages["current_device_as_cpu"] = str(error)
    torch.cuda.current_device = shimmed
    ps.shutdown(context)

    context = ps.initialize("megatron", tensor=2, timeout=30)
    compat.cuda_as_cpu = lambda device: contextlib.nullcontext()
    try:
        ps.load_adapter("megatron").engine(ps.column_parallel(8, 8, context), ps.AdamW(), context)
    except (AssertionError, RuntimeError) as error:
        messages["cuda_as_cpu"] = str(error)
    ps.shutdown(context)
    return messages


def nothing_is_left_behind():
    from megatron.core import parallel_state

    original = torch.cuda.current_device
    for sequence_parallel in (True, False):
        context = ps.initialize("megatron", tensor=2, sequence_parallel=sequence_parallel, timeout=30)
        logits = ps.column_parallel(8, 10, context)(torch.ones(4 // (2 if sequence_parallel else 1), 8))
        ps.vocab_parallel_cross_entropy(logits, torch.tensor([1, 2, 3, 9]), context).backward()
        assert parallel_state._TENSOR_MODEL_PARALLEL_GROUP is None
        ps.shutdown(context)
        assert torch.cuda.current_device is original


def test_no_global_is_left_behind():
    run_ranks(nothing_is_left_behind, 2)


def test_another_optimizer_is_refused():
    context = ps.initialize("megatron")
    model = ps.column_parallel(4, 4, context)
    with pytest.raises(ps.AdapterError, match=r"Megatron creates its own optimizer: got .*, expected polyshard.AdamW"):
        ps.load_adapter("megatron").engine(model, lambda named: None, context)
    ps.shutdown(context)
