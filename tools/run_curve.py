"""Draw the loss and the gradient norm of one run from the records that `examples/train.py --records` writes.

python tools/run_curve.py RECORDS/steps.jsonl OUT.svg
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

MEAN_OF = 20  # steps


def main(records: str, out: str) -> None:
    rows = [json.loads(line) for line in Path(records).read_text().splitlines()]
    steps = [row["step"] for row in rows]
    losses = [float(row["loss"]) for row in rows]
    means = [sum(losses[max(0, i - MEAN_OF + 1) : i + 1]) / min(i + 1, MEAN_OF) for i in range(len(losses))]
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=[2, 1])
    upper.plot(steps, losses, color="C0", linewidth=0.8, alpha=0.6, label="loss of a step")
    upper.plot(steps, means, color="C0", linewidth=2, label=f"mean of the last {MEAN_OF}")
    upper.set(ylabel="loss")
    upper.legend()
    lower.plot(steps, [float(row["grad_norm"]) for row in rows], color="C1", linewidth=0.8)
    lower.set(xlabel="step", ylabel="gradient norm")
    figure.tight_layout()
    matplotlib.rcParams["svg.hashsalt"] = "polyshard"
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
