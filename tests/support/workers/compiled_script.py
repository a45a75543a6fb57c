"""Engines that compile, one after the other in one process. Needs TORCH_COMPILE_DISABLE=0.

python compiled_script.py DIRECTORY NEW_DIRECTORY EXPERTS_DIRECTORY PROMPTS_JSON TOKENS
"""

import json
import sys

import decoder
from torch._dynamo.utils import counters
from vllm.v1.worker.gpu.cudagraph_utils import has_compiled_submodule

import polyshard as ps
from polyshard.adapters.vllm.compat import local_worker
from support.engines import engine, greedy

REGISTRATIONS = {
    "vllm": ("decoder:build_model", "vllm"),
    "transformers": ("polyshard:transformers_model", "vllm"),
    "torch": ("decoder:build_model", "torch"),
    "megatron": ("decoder:build_model", "megatron"),
}


class Breaks(decoder.Decoder):
    def forward(self, input_ids, positions=None, **kwargs):
        if positions.max().item() > 10_000:  # a number that no graph knows
            raise ValueError
        return super().forward(input_ids, positions, **kwargs)


def breaks(config, parallel_context):
    return Breaks(decoder.DecoderConfig.of(config), parallel_context)


def main():
    directory, new, experts, prompts, tokens = *sys.argv[1:4], json.loads(sys.argv[4]), int(sys.argv[5])
    context = ps.initialize()
    model = decoder.build_model(ps.read_config(new), context)
    ps.load_checkpoint(model, new, context)
    results = {}
    for name, (factory, adapter) in REGISTRATIONS.items():
        ps.register_model("Compiled", factory, adapter=adapter)
        before = counters["stats"]["unique_graphs"]
        with engine(directory, "Compiled", enforce_eager=False) as llm:
            first = greedy(llm, prompts, tokens)
            graphs = counters["stats"]["unique_graphs"] - before
            seen = has_compiled_submodule(local_worker(llm).model)  # else vLLM on CUDA captures and warms up nothing
            ps.WeightSync(model, context, llm)()
            results[name] = {"first": first, "graphs": graphs, "seen": seen, "synced": greedy(llm, prompts, tokens)}
    ps.register_model("Compiled", "moe:build_model")
    with engine(experts, "Compiled", enforce_eager=False, worker_extension_cls=ps.ROUTING_WORKER) as llm:
        first = greedy(llm, prompts, tokens)
        routing = ps.served_routing(llm, [[*prompt, *ids] for prompt, (ids, _) in zip(prompts, first)])
        results["experts"] = {
            "seen": has_compiled_submodule(local_worker(llm).model),
            "first": first,
            "routing": [[layer.tolist() for layer in layers.values()] for layers in routing],
        }
    ps.register_model("Compiled", breaks)
    try:
        with engine(directory, "Compiled", enforce_eager=False):
            pass
    except ps.RegistrationError as error:
        results["breaks"] = str(error)
    print("RESULT" + json.dumps(results))


if __name__ == "__main__":
    main()
