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

    dist.init_process_group("gloo")
    results = {}
    for adapter in adapters.split(","):
        name = f"Colocated{adapter.capitalize()}"
        ps.register_model(name, decoder.build_model, adapter=adapter)
        for directory in directories:
            options = {
                "tensor_parallel_size": dist.get_world_size(),
                "distributed_executor_backend": "external_launcher",
            }
            with engine(directory, name, **options) as llm:
                results[f"{adapter} {directory}"] = greedy(llm, json.loads(prompts), int(tokens))
            if not dist.is_initialized():
                os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    if int(os.environ["RANK"]) == 0:
        print("RESULT" + json.dumps(results))


if __name__ == "__main__":
    main()
