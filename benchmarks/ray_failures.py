"""Processes of a run on Ray that are killed in each phase: whether the run continues, and after how many seconds.

    python benchmarks/ray_failures.py [--json FILE] [--check] [--only "engine sync"]

Two trainer ranks and two vLLM engines are actors on two Ray machines (raylets of this one), the second of which has
place for one rank. In each case SIGKILL goes to an engine, a trainer rank, or the raylet of the second machine, which
another one replaces, a moment after the rollout, step, sync or save of the fourth step has begun. `continued_s` is the
time until that step is complete. `repeated` counts the steps that were done twice: those since the last state, which
is saved after every second step. `--check` exits with status 1 if a run did not end, or repeated more.
"""

from __future__ import annotations

import contextlib
import itertools
import json as codec
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import support.engines  # noqa: F401  # environment variables, before vLLM is imported
import torch
import typer
from decoder import build_model
from report import Report
from support.models.tiny import save_tiny

import polyshard as ps
from polyshard.core.waiting import Background

FOLDERS = [str(Path(__file__).resolve().parents[1] / name) for name in ("benchmarks", "examples", "tests")]
TARGETS, PHASES = ("engine", "rank", "raylet"), ("rollout", "step", "sync", "save")
STEPS, EVERY, KILL_AT = 6, 2, 4
COLUMNS = ("target", "phase", "ended", "steps", "repeated", "continued_s")


def train(folder: str, directory: str, pids: dict[str, int], target: str, phase: str, engines: list[Any]) -> None:
    """The loop on each rank. One process is killed at the phase of one step, once in the run."""
    context = ps.initialize("torch", timeout=30)
    config = ps.read_config(directory)
    model = build_model(config, context)
    ps.load_checkpoint(model, directory, context)
    trainer = ps.load_adapter("torch").engine(model, ps.AdamW(lr=1e-3), context)
    done, latest = 0, ps.latest_checkpoint(f"{folder}/states")
    if latest is not None:
        done = ps.load_training_state(trainer, latest, context).step
    once = Path(folder, "killed")

    def at(name: str, step: int) -> None:
        victim = os.getpid() if target == "rank" else pids[target]
        if name == phase and step == KILL_AT and context.rank == 1 and not once.exists():
            once.touch()
            record(folder, event="killed")
            threading.Timer(0.005, os.kill, (victim, signal.SIGKILL)).start()

    with ps.RolloutEngine(None, None, trainer, context, engines=engines, sync_timeout=120) as rollouts:
        rollouts.sync()
        for step in range(done + 1, STEPS + 1):
            at("rollout", step)
            groups = rollouts.generate([[1, 2, 3], [7, 9]], samples=4, max_tokens=60, ignore_eos=True)
            ids = torch.tensor([answer.prompt[:2] + answer.tokens for group in groups for answer in group])
            at("step", step)
            trainer.backward(trainer(ids[:, :-1], labels=ids[:, 1:]))
            trainer.step()
            at("sync", step)
            rollouts.sync()
            if step % EVERY == 0:
                at("save", step)
                ps.save_training_state(trainer, f"{folder}/states/{step:08d}", context, step=step, config=config)
            if context.rank == 0:
                record(folder, event="step", step=step)


def record(folder: str, **event: Any) -> None:
    with Path(folder, "events.jsonl").open("a") as file:
        file.write(codec.dumps({**event, "time": time.time()}) + "\n")


def one_case(cluster: Any, directory: str, target: str, phase: str) -> dict[str, Any]:
    import ray

    second = cluster.add_node(num_cpus=1)
    engines = [
        ps.ray_engine(
            directory, "Far", name=f"engine-{i}", dtype="float32", max_model_len=128, kv_cache_memory_bytes=32 << 20
        )
        for i in range(2)
    ]
    pids = {
        "engine": ray.get(engines[0].actor.pid.remote()),
        "raylet": second.all_processes["raylet"][0].process.pid,
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = (2, folder, directory, pids, target, phase, engines)
        running = Background(lambda: ps.run_on_ray(train, *arguments, restarts=2, timeout=120), "run")
        replaced = False
        while not running.wait(0.2):
            if not replaced and second.all_processes["raylet"][0].process.poll() is not None:
                cluster.add_node(num_cpus=1)
                replaced = True
        outcome = "yes" if running.error is None else f"{type(running.error).__name__}: {running.error}"[:200]
        for engine in engines:
            ray.kill(engine.actor)
        events = [codec.loads(line) for line in Path(folder, "events.jsonl").read_text().splitlines()]
    for node in [node for node in cluster.list_all_nodes() if not node.head]:
        with contextlib.suppress(Exception):
            cluster.remove_node(node)
    steps = [event["step"] for event in events if event["event"] == "step"]
    killed = [event["time"] for event in events if event["event"] == "killed"]
    after = [e["time"] for e in events if e["event"] == "step" and e["step"] >= KILL_AT and killed]
    return {
        "target": target,
        "phase": phase,
        "ended": outcome if killed else "nothing was killed",
        "steps": len(set(steps)),
        "repeated": len(steps) - len(set(steps)),
        "continued_s": after[0] - killed[0] if after else None,
    }


def main(
    only: Annotated[str | None, typer.Option(help="One case, such as 'engine sync'.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    check: Annotated[bool, typer.Option(help="Exit with status 1 if a run did not continue.")] = False,
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_MODE"], os.environ["RAY_USAGE_STATS_ENABLED"] = "disabled", "0"
    report = Report(COLUMNS)
    ps.register_model("Far", "decoder:build_model")
    cases = [tuple(only.split())] if only else list(itertools.product(TARGETS, PHASES))
    path = os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with tempfile.TemporaryDirectory() as models:
        directory = str(save_tiny(Path(models) / "model", "qwen3", head_dim=32))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
        variables = {name: os.environ[name] for name in os.environ if name.startswith(("VLLM", "OMP", "TORCH"))}
        ray.init(cluster.address, runtime_env={"env_vars": {**variables, "PYTHONPATH": path}}, log_to_driver=False)
        try:
            for target, phase in cases:
                row = one_case(cluster, directory, target, phase)
                print(row, flush=True)
                report.add(**row)
                if row["ended"] != "yes" or row["steps"] != STEPS or row["repeated"] > EVERY:
                    report.missed.append(f"{target} in {phase}: {row}")
        finally:
            ray.shutdown()
            cluster.shutdown()
    report.show()
    report.save(json, torch.device("cpu"))
    raise typer.Exit(1 if check and report.missed else 0)


if __name__ == "__main__":
    typer.run(main)
