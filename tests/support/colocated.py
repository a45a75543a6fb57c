"""Run under torchrun: one engine over the ranks (vLLM's external launcher), for each adapter's layers in turn.

torchrun --nproc-per-node 2 colocated.py ADAPTERS PROMPTS_JSON TOKENS DIRECTORY...
"""

import json
import os
import sys

from support.engines import engine, greedy


def main():
    adapters, prompts, tokens, *directories = sys.argv[1:]
    import decoder
    import torch.distributed as dist

    import polyshard as ps

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = {}
    for adapter in adapters.split(","):
        name = f"Colocated{adapter.capitalize()}"
        ps.register_model(name, decoder.build_model, adapter=adapter)
        for directory in directories:
            # vLLM destroys the process group with its engine: each engine gets a world of its own.
            rendezvous = f"file://{directory}/rendezvous-{adapter}"
            dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
            options = {"tensor_parallel_size": size, "distributed_executor_backend": "external_launcher"}
            with engine(directory, name, **options) as llm:
                results[f"{adapter} {directory}"] = greedy(llm, json.loads(prompts), int(tokens))
    if rank == 0:
        print("RESULT" + json.dumps(results))


if __name__ == "__main__":
    main()
