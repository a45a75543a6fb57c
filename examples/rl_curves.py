"""Plot runs of rl.py: reward, KL divergence of trainer and sampler, importance ratio, and time of each phase.

    python examples/rl_curves.py runs/exact-* runs/ordinary-* --output curves.png

Runs whose names differ only after the last dash (`exact-0` and `exact-1`, for two seeds) share a color.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib import pyplot
from matplotlib.axes import Axes

PHASES = ("generate", "score", "train", "sync")


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    output: Annotated[Path, typer.Option(help="A PNG or SVG file.")] = Path("curves.png"),
    smooth: Annotated[int, typer.Option(help="Steps that a point of the reward is a mean of.")] = 10,
) -> None:
    """Plot the runs."""
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    reward, divergence, ratio, time = axes.flat
    names = list(dict.fromkeys(kind_of(run) for run in runs))
    for run in runs:
        kind = kind_of(run)
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in metrics]
        style = {"color": f"C{names.index(kind)}", "alpha": 0.8, "label": kind}
        rewards = [row["reward"] for row in metrics]
        means = [sum(rewards[max(0, i - smooth + 1) : i + 1]) / min(i + 1, smooth) for i in range(len(rewards))]
        reward.plot(steps, means, **style)
        divergence.plot(steps, [abs(row["kl"]) for row in metrics], **style)
        ratio.plot(steps, [abs(row["ratio"] - 1) for row in metrics], **style)
        spent = [sum(row[f"{phase}_seconds"] for row in metrics) / len(metrics) for phase in PHASES]
        left = 0.0
        for number, (phase, seconds) in enumerate(zip(PHASES, spent)):
            time.barh(run.name, 1000 * seconds, left=1000 * left, color=f"C{number + 4}", label=phase)
            left += seconds
    for axis, title in (
        (reward, f"reward, mean of {smooth} steps"),
        (divergence, "|KL| of sampler and trainer, per token"),
        (ratio, "|importance ratio - 1|, mean"),
    ):
        axis.set(title=title, xlabel="step")
        once(axis)
    for axis in (divergence, ratio):
        axis.set_yscale("symlog", linthresh=1e-9)  # exact mode is at 0
        axis.set_ylim(bottom=0)
    time.set(title="milliseconds of a step")
    once(time, loc="upper center", ncols=len(PHASES), bbox_to_anchor=(0.5, -0.08))
    figure.savefig(output, dpi=110)
    print(f"wrote {output}")


def kind_of(run: Path) -> str:
    """Return a run's name without its seed."""
    return run.name.rpartition("-")[0] or run.name


def once(axis: Axes, **place: Any) -> None:
    """Add a legend with each label once."""
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    axis.legend(list(unique.values()), list(unique), **place)


if __name__ == "__main__":
    typer.run(main)
