"""On each rank: one engine over the ranks (vLLM's external launcher) after the other."""

import os

import torch.distributed as dist

import polyshard as ps
from support.engines import engine, greedy


def serve_all(asked, prompts, tokens):
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = []
    for adapter, directory, factory in asked:
        ps.register_model("Colocated", factory, adapter=adapter)
        # vLLM destroys the process group with its engine: each engine gets a world of its own.
        rendezvous = f"file://{directory}/rendezvous-{adapter}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
        options = {"tensor_parallel_size": size, "distributed_executor_backend": "external_launcher"}
        with engine(directory, "Colocated", **options) as llm:
            results.append(greedy(llm, prompts, tokens))
    return results
