"""Draw loss and held-out score over the steps of runs: python bench/learning_curve.py RUN… --out FILE.png

RUN is a run's metrics.jsonl, or NAME=FILE to name it in the legend. Runs that went on from one another are shown one
after the other with --joined.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def read_metrics(path: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(step, loss) and (step, J) pairs of a run, in order; of a step told twice, what was told last."""
    found: dict[str, dict[int, float]] = {"loss": {}, "J": {}}
    for line in map(json.loads, path.read_text().splitlines()):
        for name in found.keys() & line.keys():
            found[name][line["step"]] = line[name]
    return sorted(found["loss"].items()), sorted(found["J"].items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--joined", action="store_true", help="each run starts where the one before ended")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    start = 0
    for run in arguments.runs:
        name, _, path = run.rpartition("=")
        losses, scores = read_metrics(Path(path))
        upper.plot([start + step for step, _ in losses], [loss for _, loss in losses], label=name or path)
        lower.plot([start + step for step, _ in scores], [score for _, score in scores], marker="o", label=name or path)
        if arguments.joined:
            start += max(step for step, _ in losses + scores)
    upper.set_ylabel("loss")
    lower.set_ylabel("mean J, held out")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    upper.legend()
    figure.savefig(arguments.out, dpi=120)


if __name__ == "__main__":
    main()
