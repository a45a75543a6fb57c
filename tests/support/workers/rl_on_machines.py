"""A loop of sampling and training under torchrun, with vLLM's server on another machine: started as a script.

Before each sync it waits while a file `sync-N` is in the folder `--pauses`. After each step it prints the server's
answers and the directory with the weights that gave them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path

import decoder
import torch

import polyshard as ps
from polyshard.core.ranks import Ranks

PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40))]


def train(directory: str, url: str, out: str, steps: int, timeout: float, pauses: Path) -> None:
    context = ps.initialize("torch", tensor=int(os.environ.get("WORLD_SIZE", "1")), timeout=timeout)
    ranks = Ranks.of(context)
    config = ps.read_config(directory)
    model = decoder.build_model(config, context)
    ps.load_checkpoint(model, directory, context)
    trainer = ps.load_adapter("torch").engine(model, ps.AdamW(lr=5e-3), context)
    latest = ps.latest_checkpoint(f"{out}/states")
    done = 0 if latest is None else ps.load_training_state(trainer, latest, context).step
    client = ps.HttpClient(url, "far", timeout=60)
    with ps.RolloutEngine(None, None, trainer, context, engines=[client], sync_timeout=timeout / 2) as rollouts:
        for step in range(done + 1, steps + 1):
            if (place := pauses / f"sync-{step}").exists():
                print(f"paused sync-{step}", flush=True)
                while place.exists():
                    time.sleep(0.02)
            rollouts.sync(f"{step}")
            groups = rollouts.generate(PROMPTS, max_tokens=8, temperature=0.0, ignore_eos=True)
            weights = ps.save_checkpoint(trainer, f"{out}/weights-{step}", context, config=config)
            if ranks.rank == 0:
                answers = [[answer.tokens, answer.logprobs, answer.versions] for (answer,) in groups]
                print(json.dumps({"step": step, "answers": answers, "weights": str(weights)}), flush=True)
            ids = torch.tensor([answer.prompt[:3] + answer.tokens for (answer,) in groups])
            trainer.backward(trainer(ids[:, :-1], labels=ids[:, 1:]))
            trainer.step()
            ps.save_training_state(trainer, f"{out}/states/{step:08d}", context, step=step, config=config)
            if step == 1:
                rollouts.leave("far")
                rollouts.join(client)
    trainer.close()
    ps.shutdown(context)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("url")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=10.0)
    parser.add_argument("--pauses", type=Path, required=True)
    given = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    try:
        train(given.directory, given.url, given.out, given.steps, given.timeout, given.pauses)
    except ps.PolyshardError as error:
        print(f"failed {type(error).__name__}: {error}", flush=True)
        raise


if __name__ == "__main__":
    main()
