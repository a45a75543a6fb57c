"""On each rank: one engine over the ranks, which serves the module that the ranks hold already."""

import os
from pathlib import Path

import decoder
import torch

import polyshard as ps
from support.engines import engine, greedy

PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40)), list(range(40))]


def serve_own(directory, out, adapter):
    size = int(os.environ["WORLD_SIZE"])
    context = ps.initialize(adapter, tensor=size, timeout=120)
    config = ps.read_config(directory)
    model = decoder.build_model(config, context)
    ps.load_checkpoint(model, directory, context)
    ps.register_model("Existing", model)
    alone = Path(out) / f"config-{context.rank}"
    ps.save_config(alone, config, architecture="Existing")
    options = {"tensor_parallel_size": size, "distributed_executor_backend": "external_launcher"}
    result = {}
    with engine(alone, load_format="polyshard", **options) as llm:
        result["before"] = greedy(llm, PROMPTS, 8)
        with ps.WeightSync(model, context, llm) as sync:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.05)
            try:
                greedy(llm, PROMPTS[:1], 1)
            except ps.WeightSyncError as error:
                result["refused"] = str(error)
            result["shared"] = sync().shared_bytes
            result["held"] = sum(parameter.nbytes for parameter in model.parameters())
            result["after"] = greedy(llm, PROMPTS, 8)
        ps.save_checkpoint(model, Path(out) / "trained", context, config=config)
    return result
