"""Policy optimization with GRPO: samples from vLLM, optimizer steps on any parallelism library, live weight sync.

    python examples/rl.py runs/rl                                                   # a tiny model, minutes
    torchrun --nproc-per-node 2 examples/rl.py runs/rl --adapter megatron --tensor-parallel 2
    python examples/rl.py runs/rl --separate                                        # vLLM in separate processes
    python examples/rl.py runs/rl --ordinary                                        # without exact mode
    python examples/rl.py runs/rl --task experts --ordinary --replay                # a mixture of experts, replayed
    python examples/rl.py runs/rl --server http://10.0.0.3:8000 --staleness 1       # vLLM's server on another machine
    python examples/rl.py runs/rl --ray --ranks 2 --engines 2 --staleness 1         # all of it as Ray actors
    python examples/rl.py runs/rl --task addition --dtype bfloat16 --prompts 8 --samples 8 --learning-rate 5e-6
    python examples/rl_curves.py runs/rl* --output curves.png

A restarted run continues from its last training state. In exact mode trainer and sampler agree bit for bit: their KL
divergence is 0, and the importance ratio of a fresh sample is 1.

With `--staleness N` the engines sample the prompts of the next N steps while the trainer trains. A sync interrupts
completions, which go on with the new weights. Each token's importance ratio is to the weights that sampled it.

Source: Shao et al. 2024, "DeepSeekMath" (GRPO).
"""

from __future__ import annotations

import json
import os

# Set before torch and vLLM are imported: for such small models thread synchronization costs more than the work itself,
# and compiling the sampler takes longer than a run.
QUIET = {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
for name, value in QUIET.items():
    os.environ.setdefault(name, value)

import time
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from rl_tasks import Addition, Experts, Successor
from smollm2 import smollm2_directory

import polyshard as ps

NAME = "PolyshardPolicy"
CLIP = 0.2


class Dtype(StrEnum):
    """The dtype of the vLLM engine; the trainer's parameters stay float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Task(StrEnum):
    """The task that the model learns."""

    successor = "successor"  # a tiny model with random weights
    experts = "experts"  # the same task for a tiny mixture of experts
    addition = "addition"  # SmolLM2-135M


def main(
    run: Annotated[Path, typer.Argument(help="Folder of this run: metrics, training states.")],
    task: Annotated[Task, typer.Option(help="By tiny models of random weights, or by SmolLM2.")] = Task.successor,
    adapter: Annotated[str, typer.Option(help="Parallelism library.")] = "torch",
    tensor_parallel: Annotated[int, typer.Option(help="Ranks that share each layer; the rest is data parallel.")] = 1,
    separate: Annotated[bool, typer.Option(help="vLLM in processes of its own, which may die.")] = False,
    ordinary: Annotated[bool, typer.Option(help="Without exact mode.")] = False,
    replay: Annotated[bool, typer.Option(help="The trainer's tokens take the sampler's experts.")] = False,
    dtype: Dtype = Dtype.float32,
    steps: int = 400,
    prompts: Annotated[int, typer.Option(help="Of each step.")] = 16,
    samples: Annotated[int, typer.Option(help="Answers to each prompt.")] = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
    every: Annotated[int, typer.Option(help="Steps between training states.")] = 100,
    server: Annotated[list[str] | None, typer.Option(help="URL of a vLLM server; may be repeated.")] = None,
    staleness: Annotated[int, typer.Option(help="Steps that samples may be behind, with --server or --ray.")] = 0,
    ray: Annotated[bool, typer.Option(help="Trainer ranks and engines as Ray actors.")] = False,
    ranks: Annotated[int, typer.Option(min=1, help="Trainer ranks, with --ray.")] = 1,
    engines: Annotated[int, typer.Option(min=1, help="vLLM engines, with --ray.")] = 1,
    restarts: Annotated[int, typer.Option(help="How often trainer ranks are replaced, with --ray.")] = 3,
) -> None:
    """Generate samples, score them, update the weights, and sync them to vLLM."""
    if staleness and not (server or ray):
        raise typer.BadParameter("--staleness requires --server or --ray")
    if ray and (server or separate):
        raise typer.BadParameter("--ray starts engines of its own: leave out --server and --separate")
    if replay and task is not Task.experts:
        raise typer.BadParameter("--replay requires --task experts")
    settings = Settings(
        run=run.resolve(),
        task=task,
        adapter=adapter,
        tensor_parallel=tensor_parallel,
        separate=separate,
        ordinary=ordinary,
        replay=replay,
        dtype=dtype,
        steps=steps,
        prompts=prompts,
        samples=samples,
        learning_rate=learning_rate,
        seed=seed,
        every=every,
        staleness=staleness,
    )
    if ray:
        with_ray(settings, ranks, engines, restarts)
    else:
        train(settings, [ps.HttpClient(url) for url in server or []])


@dataclass(frozen=True)
class Settings:
    """The command line's settings of the loop."""

    run: Path
    task: Task
    adapter: str
    tensor_parallel: int
    separate: bool
    ordinary: bool
    replay: bool
    dtype: Dtype
    steps: int
    prompts: int
    samples: int
    learning_rate: float
    seed: int
    every: int
    staleness: int

    def modes(self, ranks: int) -> dict[str, Any]:
        """Return the arguments of exact mode."""
        return {} if self.ordinary else {"exact": True, "exact_shards": ranks}

    def engine(self) -> dict[str, Any]:
        """Return the arguments of vLLM's engine."""
        chosen = task_of(self.task)
        return {
            "dtype": self.dtype.value,
            "max_model_len": min(chosen.config.max_position_embeddings, 512),
            "kv_cache_memory_bytes": 256 << 20,
            "seed": self.seed,
        }


def task_of(task: Task) -> Any:
    """Return the task."""
    tiny = {Task.successor: Successor, Task.experts: Experts}
    return tiny[task]() if task in tiny else Addition(smollm2_directory())


def with_ray(settings: Settings, ranks: int, engines: int, restarts: int) -> None:
    """Run the loop on Ray: each engine and each trainer rank is an actor on some machine of the cluster."""
    import ray

    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    own: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": ranks + engines}
    ray.init(runtime_env={"env_vars": {**QUIET, "PYTHONPATH": path}}, log_to_driver=False, **own)
    ps.register_model(NAME, task_of(settings.task).factory, **settings.modes(ranks))
    directory = start_of(settings)
    resources = {"GPU": 1.0} if torch.cuda.is_available() else {"CPU": 1.0}
    options: dict[str, Any] = settings.engine()
    if settings.replay:
        options["worker_extension_cls"] = ps.ROUTING_WORKER
    clients = [
        ps.ray_engine(directory, NAME, name=f"engine-{i}", resources=resources, timeout=600, **options)
        for i in range(engines)
    ]
    ps.run_on_ray(train, ranks, settings, clients, resources=resources, restarts=restarts)
    ray.shutdown()


def start_of(settings: Settings) -> Path:
    """Return the directory of the model with which the run begins; random weights are saved first."""
    chosen = task_of(settings.task)
    if chosen.model is not None:
        return chosen.model
    directory = settings.run / "start"
    if not (directory / "config.json").exists():
        context = ps.initialize("torch")
        policy = chosen.build(chosen.config, context)
        ps.initialize_weights(policy, context, seed=settings.seed)
        ps.save_checkpoint(policy, directory, context, config=chosen.config)
        ps.shutdown(context)
    return directory


def train(settings: Settings, clients: list[Any]) -> None:
    """Run the loop on this rank.

    Args:
        settings: the command line's.
        clients: clients of engines; empty for an engine of the trainer's own.
    """
    wanted: Any = getattr(torch, settings.dtype.value)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    ordinary, steps, seed, run = settings.ordinary, settings.steps, settings.seed, settings.run
    modes = settings.modes(world)
    # float32 parameters: with such learning rates bfloat16 would round an update away.
    masters: dict[str, Any] = {} if ordinary else {"precision": ps.Precision(compute=wanted)}
    context = ps.initialize(settings.adapter, tensor=settings.tensor_parallel, **modes, **masters)
    chosen = task_of(settings.task)
    ps.register_model(NAME, chosen.build, **modes)
    rank, share = context.get_data_parallel_rank(), context.get_data_parallel_world_size()
    first = context.axis("tensor").rank == 0 and rank == 0
    if settings.prompts * settings.samples < share:
        raise ValueError(
            f"--prompts times --samples must be at least the number of data-parallel ranks: got {settings.prompts} x "
            f"{settings.samples}, expected at least {share}"
        )

    config = chosen.config
    policy = chosen.build(config, context)
    directory = chosen.model or run / "start"
    if chosen.model is not None or clients:
        ps.load_checkpoint(policy, directory if chosen.model else start_of(settings), context)
    else:
        ps.initialize_weights(policy, context, seed=seed)
        ps.save_checkpoint(policy, directory, context, config=config)
    trainer = ps.load_adapter(settings.adapter).engine(
        policy, ps.AdamW(lr=settings.learning_rate, weight_decay=0.0), context, max_grad_norm=1.0
    )
    begin = 0
    latest = ps.latest_checkpoint(run / "states")
    if latest is not None:
        begin = ps.load_training_state(trainer, latest, context).step
    log = Log(run, begin) if first else None

    if clients:
        engine = ps.RolloutEngine(None, None, trainer, context, engines=clients, return_routing=settings.replay)
    else:
        engine = ps.RolloutEngine(
            directory,
            NAME,
            trainer,
            context,
            colocated=not settings.separate,
            return_routing=settings.replay,
            **settings.engine(),
        )
    current = int(engine.sync().version)
    limits = {"max_tokens": chosen.max_tokens, "stop_token_ids": list(chosen.stop_token_ids)}

    def asked(step: int) -> list[list[int]]:
        """Return the prompts of a step."""
        return chosen.prompts(settings.prompts, torch.Generator().manual_seed(seed * 1_000_003 + step))

    with engine, Progress(disable=not first, transient=True) as progress:
        bar = progress.add_task("training", total=steps, completed=begin)
        for step in range(begin, min(begin + settings.staleness, steps)):
            engine.submit(asked(step), samples=settings.samples, **limits)
        for step in range(begin, steps):
            clock = Clock()
            if clients:
                if step + settings.staleness < steps:
                    engine.submit(asked(step + settings.staleness), samples=settings.samples, **limits)
                groups = engine.collect()
            else:
                groups = engine.generate(asked(step), samples=settings.samples, **limits)
            clock("generate")
            rewards = torch.tensor([[chosen.reward(r.prompt, r.tokens) for r in group] for group in groups])
            advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
            clock("score")
            answers = [(r, float(a)) for group, row in zip(groups, advantages) for r, a in zip(group, row)]
            total = sum(len(r.tokens) for r, _ in answers)
            mixed = (
                torch.autocast(context.device.type, wanted) if ordinary and wanted != torch.float32 else nullcontext()
            )
            mine = [rollout for rollout, _ in answers[rank::share]]
            taken = ps.replay_routing(policy, ps.packed_routing(mine)) if settings.replay else nullcontext()
            with mixed, taken:
                own, told, weights = logprobs(trainer, answers[rank::share], context.device)
            ratio = (own - told).exp()
            gain = torch.minimum(ratio * weights, ratio.clamp(1 - CLIP, 1 + CLIP) * weights)
            trainer.backward(-gain.sum() * share / total)
            norm = trainer.step().grad_norm
            clock("train")
            versions = torch.tensor([int(v) for group in groups for r in group for v in r.versions])
            fresh = torch.tensor([int(v) == current for r, _ in answers[rank::share] for v in r.versions])
            behind = current - int(versions.min())
            current = int(engine.sync().version)
            clock("sync")
            gap = (told - own).detach()
            differs = (gap != 0).cpu() & fresh
            seen = sums_over_data(context, [gap.sum(), differs.sum(), ratio.detach().sum(), fresh.sum()])
            metrics = {
                "step": step + 1,
                "reward": float(rewards.mean()),
                "kl": seen[0] / total,
                "bits_differ": seen[1] / max(1.0, seen[3]),
                "ratio": seen[2] / total,
                "gradient_norm": norm,
                "tokens_per_second": total / clock.seconds["generate"],
                "restarted": engine.restarted,
                "staleness": behind,
                "fresh": seen[3] / total,
                **{f"{phase}_seconds": spent for phase, spent in clock.seconds.items()},
            }
            if log is not None:
                log.write(metrics)
                line = f"reward {metrics['reward']:.3f}  KL {metrics['kl']:.1e}  ratio {metrics['ratio']:.6f}"
                progress.update(bar, advance=1, description=line)
                if step % 25 == 0 or step + 1 == steps:
                    print(f"step {step + 1:4d}  {line}  {metrics['tokens_per_second']:.0f} tokens/s", flush=True)
            if (step + 1) % settings.every == 0:
                place = run / "states" / f"step-{step + 1:08d}"
                ps.save_training_state(trainer, place, context, step=step + 1, config=config)
    ps.save_checkpoint(trainer, run / "policy", context, config=config, architecture=NAME, factory=chosen.factory)
    trainer.close()
    ps.shutdown(context)


def logprobs(
    trainer: ps.TrainingEngine, answers: list[tuple[ps.Rollout, float]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the trainer's log-probability, the sampler's, and the advantage of the sampled tokens, concatenated."""
    sequences = [r.prompt + r.tokens for r, _ in answers]
    ids = torch.tensor([token for sequence in sequences for token in sequence], device=device)
    bounds = torch.tensor([0, *map(len, sequences)], device=device).cumsum(0).to(torch.int32)
    everything = trainer(ids, cu_seqlens=bounds, targets=ids.roll(-1))  # the last token of a sequence has no target
    sampled = torch.cat([torch.arange(end - len(r.tokens), end) for end, (r, _) in zip(bounds[1:].tolist(), answers)])
    told = torch.tensor([value for r, _ in answers for value in r.logprobs], device=device)
    weights = torch.tensor([advantage for r, advantage in answers for _ in r.tokens], device=device)
    return everything[sampled.to(device) - 1], told, weights


def sums_over_data(context: ps.ParallelContext, values: list[torch.Tensor]) -> list[float]:
    """Return the sum of each value over data-parallel ranks."""
    axis = context.axis("data")
    stacked = torch.stack([value.double() for value in values])
    return (stacked if axis.collectives is None else axis.collectives.all_reduce(stacked)).tolist()


class Clock:
    """A timer for the phases of a step, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, phase: str) -> None:
        """Record the end of a phase."""
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now


class Log:
    """A log with one line of JSON for each step. A resumed run drops the lines of the steps that it repeats."""

    def __init__(self, run: Path, begin: int) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self._path = run / "metrics.jsonl"
        kept = self._path.read_text().splitlines()[:begin] if self._path.exists() else []
        self._path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, metrics: dict[str, Any]) -> None:
        """Append the line of a step."""
        with self._path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
