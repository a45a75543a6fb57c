"""On each rank: trainers of several libraries and sizes beside one engine over the same ranks."""

import os
from pathlib import Path

import decoder
import torch
from safetensors.torch import load_file

import polyshard as ps
from polyshard.adapters.vllm.transfer.source import LayoutSource
from support.engines import engine, greedy

PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40)), list(range(40))]


def train_beside(directory, out, served, trainers):
    ps.initialize("torch", timeout=120)
    ps.register_model("Beside", decoder.build_model, adapter=served)
    size = int(os.environ["WORLD_SIZE"])
    options = {"tensor_parallel_size": size, "distributed_executor_backend": "external_launcher"}
    results = {}
    with engine(directory, "Beside", enable_prefix_caching=True, **options) as llm:
        old = greedy(llm, PROMPTS, 8)
        for number, (adapter, tensor, settings) in enumerate(trainers):
            settings = dict(settings)
            context = ps.initialize(adapter, tensor=tensor, pipeline=settings.pop("pipeline", 1), timeout=120)
            config = ps.read_config(directory)
            model = decoder.build_model(config, context)
            ps.load_checkpoint(model, directory, context)
            trainer = ps.load_adapter(adapter).engine(
                model, ps.AdamW(lr=5e-3 * (number + 1)), context, max_grad_norm=None, **settings
            )
            ids = torch.arange(24).reshape(2, 12)
            with ps.WeightSync(trainer, context, llm, bucket_bytes=30_000) as sync:
                for _ in range(2):
                    trainer.train_batch([{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}] * 2)
                    trainer.step()
                    report = sync()
                    synced = greedy(llm, PROMPTS, 8)
            saved = ps.save_checkpoint(trainer, Path(out) / f"{served}-{number}", context, config=config)
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(saved)})
            llm.reset_prefix_cache()
            stored = load_file(saved / "model.safetensors")
            source = {name: value.clone() for name, value in LayoutSource(trainer, context)}
            results[f"{adapter} {tensor} {trainers[number][2]}"] = {
                "as a source of vLLM's": source.keys() == stored.keys()
                and all(torch.equal(value, source[name]) for name, value in stored.items()),
                "new": synced != old,
                "as loaded from disk": synced == greedy(llm, PROMPTS, 8),
                "shared": report.shared_bytes,
            }
            trainer.close()
            for undo in context.on_shutdown:
                undo()
    return results
