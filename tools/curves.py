"""Draw the loss curves of examples/train.py --figures into one picture, and print how far apart they lie.

python tools/curves.py OUT.png torch=FIGURES.json megatron=FIGURES.json ...
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def main(out: str, *named: str) -> None:
    curves = {name: json.loads(Path(path).read_text())["losses"] for name, path in (n.split("=", 1) for n in named)}
    first_name, first = next(iter(curves.items()))
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=[2, 1])
    for i, (name, losses) in enumerate(curves.items()):
        steps = range(1, len(losses) + 1)
        upper.plot(steps, losses, color=f"C{i}", linewidth=7 - 2 * i if i < 4 else 1, label=name)
        if name != first_name:
            apart = [max(abs(a - b), 1e-9) for a, b in zip(losses, first)]
            lower.semilogy(steps, apart, color=f"C{i}", label=name)
            print(f"{name}: at most {max(apart):.1e} from {first_name}")
    upper.set(ylabel="loss", title="SmolLM2-135M on the Python documentation, two data-parallel ranks")
    lower.set(xlabel="step", ylabel=f"distance to {first_name}")
    upper.legend()
    lower.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
