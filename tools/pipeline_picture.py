"""Draw who computed when in a pipeline, from the measured times of benchmarks/pipeline.py --events.

python tools/pipeline_picture.py EVENTS.json OUT.svg
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Patch

COLOURS = {"forward": "#4c78a8", "loss": "#9ecae9", "backward": "#f58518", "weights": "#54a24b"}
MEANINGS = {
    "forward": "forward pass",
    "loss": "head and loss",
    "backward": "backward pass (of inputs only beside green)",
    "weights": "gradients of weights",
}


def main(events_file: str, out: str) -> None:
    schedules = json.loads(Path(events_file).read_text())
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "polyshard", "font.size": 9})
    figure, panels = pyplot.subplots(len(schedules), 1, figsize=(10, 1.5 * len(schedules) + 0.5), squeeze=False)
    for panel, (name, ranks) in zip(panels[:, 0], schedules.items()):
        begin = min(event["start"] for events in ranks for event in events)
        for rank, events in enumerate(ranks):
            for event in events:
                start, width = 1e3 * (event["start"] - begin), 1e3 * (event["stop"] - event["start"])
                panel.barh(
                    rank,
                    width,
                    left=start,
                    height=0.9,
                    color=COLOURS[event["kind"]],
                    edgecolor="white",
                    linewidth=0.4,
                    hatch="//" if event["stage"] >= len(ranks) else None,
                )
                if event["kind"] in ("forward", "backward"):
                    panel.text(start + width / 2, rank, str(event["micro_batch"]), ha="center", va="center", fontsize=6)
        panel.set(title=name, yticks=range(len(ranks)), yticklabels=[f"rank {rank}" for rank in range(len(ranks))])
        panel.invert_yaxis()
    panels[-1, 0].set(xlabel="milliseconds; numbers are micro-batches, hatched bars are the rank's second stage")
    handles = [Patch(color=colour, label=MEANINGS[kind]) for kind, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="upper center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
