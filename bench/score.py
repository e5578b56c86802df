"""Score weights on sequences they were not trained on: python bench/score.py --data DAVIS [--split held]

Mean J and F of the tracker with the default weights beside two floors: the first mask repeated, and the same network
before training. First and last frame are left out, as in the DAVIS evaluation. DAVIS is a folder in that layout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from stm_model import STM, STMConfig, Tracker
from stm_model.data.davis import Sequence, davis_sequences
from stm_model.evaluation.metrics import sequence_scores
from stm_model.runtime import default_device, default_dtype
from stm_model.training.train import initialize


def untrained_network(device: torch.device) -> STM:
    """The network that training starts from."""
    torch.manual_seed(0)
    model = STM(STMConfig.small())
    initialize(model)
    return model.eval().to(device, default_dtype(device), memory_format=torch.channels_last)


def scores_of(sequence: Sequence, tracker: Tracker | None) -> tuple[float, float]:
    """Mean J and F over the objects of a sequence; without a tracker the first mask is repeated."""
    frames, truths = sequence.load()
    if tracker is None:
        predictions: list[np.ndarray] = [truths[0]] * len(truths)
    else:
        predictions = [result.labels for result in tracker.track(frames, {0: truths[0]})]
    scores = sequence_scores(predictions, truths).values()
    return statistics.mean(j for j, _ in scores), statistics.mean(f for _, f in scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in the DAVIS layout")
    parser.add_argument("--split", default="held", help="list under ImageSets")
    parser.add_argument("--checkpoint", type=Path, help="weights to score; default: those in the package")
    parser.add_argument("--memory", default="every:5")
    parser.add_argument("--size", type=int)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    device = default_device()
    options = {"memory": arguments.memory, "size": arguments.size}
    trackers = {
        "trained": Tracker(STM.load(arguments.checkpoint, device), **options),
        "untrained network": Tracker(untrained_network(device), **options),
        "first mask repeated": None,
    }
    sequences = davis_sequences(arguments.data, arguments.split)
    rows = {
        name: {sequence.name: scores_of(sequence, tracker) for sequence in tqdm(sequences, desc=name, leave=False)}
        for name, tracker in trackers.items()
    }
    print(f"{'':22} {'J':>6} {'F':>6}")
    means = {}
    for name, row in rows.items():
        means[name] = [statistics.mean(score[part] for score in row.values()) for part in (0, 1)]
        print(f"{name:22} {means[name][0]:6.3f} {means[name][1]:6.3f}")
    for sequence, (j, f) in rows["trained"].items():
        print(f"  {sequence:20} {j:6.3f} {f:6.3f}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python", *sys.argv])
        report = {"command": command, "split": arguments.split, "mean": means, "sequences": rows}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
