"""A user's script that registers its own factory inside the guard and starts an engine with spawned workers.

python serving_script.py DIRECTORY TENSOR_PARALLEL ADAPTER PROMPTS_JSON TOKENS [OPTIONS_JSON]
"""

import json
import sys

import decoder

import polyshard as ps


def my_factory(config, parallel_context):
    return decoder.build_model(config, parallel_context)


def main():
    from vllm import LLM

    from support.engines import greedy

    directory, size, adapter, prompts, tokens = sys.argv[1:6]
    options = json.loads(sys.argv[6]) if len(sys.argv) > 6 else {}
    ps.register_model("ScriptDecoder", options.pop("factory", my_factory), adapter=adapter)
    settings = {
        "hf_overrides": {"architectures": ["ScriptDecoder"]},
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        "tensor_parallel_size": int(size),
        "kv_cache_memory_bytes": 64 << 20,
        "skip_tokenizer_init": True,
        **options,
    }
    llm = LLM(model=directory, **settings)
    found = greedy(llm, json.loads(prompts), int(tokens))
    if "worker_extension_cls" in options:
        sequences = [[*prompt, *ids] for prompt, (ids, _) in zip(json.loads(prompts), found, strict=True)]
        routing = [
            {name: experts.tolist() for name, experts in one.items()} for one in ps.served_routing(llm, sequences)
        ]
        found = {"generated": found, "routing": routing}
    print("RESULT" + json.dumps(found))


if __name__ == "__main__":
    main()
