"""Run under torchrun: one engine over the ranks, which serves the module that the ranks hold already.

torchrun --nproc-per-node 2 colocated_existing.py DIRECTORY OUT ADAPTER
"""

import json
import os
import sys
from pathlib import Path

import torch

from support.engines import engine, greedy

PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40)), list(range(40))]


def main():
    directory, out, adapter = sys.argv[1:]
    import decoder

    import polyshard as ps

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
    Path(out, f"result-{context.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
