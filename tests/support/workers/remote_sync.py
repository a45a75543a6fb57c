"""On each rank: a trainer whose first rank runs a vLLM engine in child processes."""

import os
from pathlib import Path

from support.engines import greedy

TORCHRUN = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC")
PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40)), list(range(40))]


def own_engine(directory, tensor, dtype, adapter="vllm"):
    """Start an engine whose processes do not see torchrun's environment."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    import decoder
    from vllm import LLM

    import polyshard as ps

    ps.register_model("Synced", decoder.build_model, adapter=adapter)
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(TORCHRUN)}
    try:
        return LLM(
            str(directory),
            hf_overrides={"architectures": ["Synced"]},
            tensor_parallel_size=tensor,
            dtype=dtype,
            max_model_len=256,
            enforce_eager=True,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            kv_cache_memory_bytes=64 << 20,
            enable_prefix_caching=True,
            weight_transfer_config={"backend": "polyshard"},
        )
    finally:
        os.environ.update(kept)


def trainer(directory, adapter, tensor, options, timeout=60, build=None):
    """A model with other weights than the directory's, around which training has begun; by default a decoder."""
    import decoder
    import torch

    import polyshard as ps

    context = ps.initialize(adapter, tensor=tensor, timeout=timeout)
    config = ps.read_config(directory)
    model = (build or decoder.build_model)(config, context)
    ps.load_checkpoint(model, directory, context)
    engine = ps.load_adapter(adapter).engine(model, ps.AdamW(lr=5e-3), context, max_grad_norm=None, **options)
    ids = torch.arange(24).reshape(2, 12)
    for _ in range(3):
        engine.backward(-engine(ids[:, :-1], targets=ids[:, 1:]).mean())
        engine.step()
    return context, engine, config


def train_apart(directory, out, adapter, tensor, options, engine_tensor, dtype):
    import polyshard as ps

    context, engine, config = trainer(directory, adapter, tensor, options)
    llm = own_engine(directory, engine_tensor, dtype) if context.rank == 0 else None
    before = greedy(llm, PROMPTS, 8) if llm else None
    result = {}
    with ps.WeightSync(engine, context, llm, bucket_bytes=20_000, timeout=60) as sync:
        for name in ("first", "second"):
            report = sync(name)
            if llm:
                result[name] = greedy(llm, PROMPTS, 8)
                result[f"{name} version"] = llm.llm_engine.get_weight_version()
    client = ps.LlmClient(llm) if llm else None
    with ps.WeightSync(engine, context, client, bucket_bytes=20_000, timeout=60) as sync:
        sync("over the network")
        if llm:
            result["over the network"] = greedy(llm, PROMPTS, 8)
    ps.save_checkpoint(engine, Path(out) / "trained", context, config=config)
    ps.shutdown(context)
    return {"before": before, "tensors": report.tensors, **result}
