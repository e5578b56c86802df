"""What leaving out costs and gains on real clips: python bench/choice.py --data DAVIS [--split held] [--out FILE]

The tracker with the default weights reads its memory exactly, with `skip=1e-3` and with `top_k=30`. For each: J, and
seconds per frame of the whole and of the read; for skipping also the share of blocks left out and the greatest weight
that any query left out. The three run frame by frame in alternation, on one thread; on a CPU seconds are of processor
time. DAVIS is a folder in that layout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
import torch
from machine import clock
from tqdm import tqdm
from track import device_name

from stm_kernels import PagedMemory
from stm_kernels.operator import read_operator
from stm_model import STM, Tracker
from stm_model.data.davis import davis_videos
from stm_model.data.video import Video
from stm_model.evaluation.metrics import sequence_scores
from stm_model.network.weights import DEFAULT_WEIGHTS_SIZE
from stm_model.runtime import default_device

VARIANTS = {"exact": {}, "skip=1e-3": {"skip": 1e-3}, "top_k=30": {"top_k": 30}}


@dataclass
class Figures:
    """What was measured of a variant."""

    frame_seconds: list[float] = field(default_factory=list)
    """Of a whole frame, where one was segmented."""
    read_seconds: list[float] = field(default_factory=list)
    """Of a frame's read."""
    blocks_left_out: list[float] = field(default_factory=list)
    """Share by read, where a read may skip."""
    most_left_out: float = 0.0
    """Greatest weight that a query left out."""
    positions: int = 0
    """Greatest number of memory positions read."""
    J: dict[str, float] = field(default_factory=dict)
    """Mean over the objects of a sequence."""


@contextmanager
def measured_reads(figures: Figures, device: torch.device):
    """Time every read of a memory, then look at what it left out; seconds of the reads, and of the looks."""
    read, seconds, looks = PagedMemory.read, [], []

    def measured(memory: PagedMemory, query_key: torch.Tensor, *, skip: float = 0.0, **options):
        start = clock(device)
        out, skipped = read(memory, query_key, skip=skip, return_skipped=True, **options)
        seconds.append(clock(device) - start)
        figures.positions = max(figures.positions, len(memory))
        if skip:
            figures.most_left_out = max(figures.most_left_out, skipped.max().item())
            start = clock(device)
            figures.blocks_left_out.append(left_out(memory, query_key, skip))
            looks.append(clock(device) - start)
        return out

    PagedMemory.read = measured
    try:
        yield seconds, looks
    finally:
        PagedMemory.read = read


def left_out(memory: PagedMemory, query_key: torch.Tensor, skip: float) -> float:
    """The share of blocks of queries and memory positions whose values are not read."""
    scale = query_key.shape[2] ** -0.5
    read = blocks = 0
    for key, value in memory.state()["pages"]:
        kept = read_operator(query_key, key, value, None, None, scale, 0, skip, "auto")[3]
        read, blocks = read + int(kept.sum()), blocks + kept.numel()
    return 1 - read / blocks


def track(sequence: Video, trackers: dict[str, Tracker], figures: dict[str, Figures], device: torch.device) -> None:
    """Track a sequence by all variants, frame by frame in alternation."""
    frames, truths = sequence.load()
    running = {name: tracker.track(frames, {0: truths[0]}) for name, tracker in trackers.items()}
    predictions: dict[str, list[np.ndarray]] = {name: [] for name in running}
    for index in range(len(frames)):
        for name, results in running.items():
            with measured_reads(figures[name], device) as (reads, looks):
                start = clock(device)
                predictions[name].append(next(results).labels)
                seconds = clock(device) - start
            if index:
                figures[name].frame_seconds.append(seconds - sum(looks))
                figures[name].read_seconds.append(sum(reads))
    for name, labels in predictions.items():
        scores = sequence_scores(labels, truths).values()
        figures[name].J[sequence.name] = statistics.mean(j for j, _ in scores)


def row(figures: Figures, exact: Figures) -> dict:
    """The figures of a variant, beside those of the exact read."""
    J = statistics.mean(figures.J.values())
    return {
        "J": J,
        "J_minus_exact": J - statistics.mean(exact.J.values()),
        "J_by_sequence": figures.J,
        "frame_seconds": statistics.median(figures.frame_seconds),
        "read_seconds": statistics.median(figures.read_seconds),
        "read_seconds_in_all": sum(figures.read_seconds),
        "read_speed_up": sum(exact.read_seconds) / sum(figures.read_seconds),
        "blocks_left_out": statistics.mean(figures.blocks_left_out) if figures.blocks_left_out else None,
        "most_weight_left_out": figures.most_left_out if figures.blocks_left_out else None,
        "most_positions": figures.positions,
        "frames": len(figures.frame_seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in the DAVIS layout")
    parser.add_argument("--split", default="held", help="list under ImageSets")
    parser.add_argument("--memory", default="every:5")
    parser.add_argument("--size", type=int, default=DEFAULT_WEIGHTS_SIZE, help="shorter side in pixels")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = default_device()
    model = STM.load(device=device)
    settings = {"memory": arguments.memory, "size": arguments.size}
    trackers = {name: Tracker(model, **settings, **options) for name, options in VARIANTS.items()}
    figures = {name: Figures() for name in VARIANTS}
    for sequence in tqdm(davis_videos(arguments.data, arguments.split), desc="track", unit="sequence"):
        track(sequence, trackers, figures, device)
    rows = {name: row(figures[name], figures["exact"]) for name in VARIANTS}
    print(f"{'':10}{'J':>8}{'change':>9}{'frame s':>9}{'read s':>9}{'faster':>8}{'blocks left out':>17}{'weight':>10}")
    for name, cells in rows.items():
        print(
            f"{name:10}{cells['J']:8.4f}{cells['J_minus_exact']:+9.4f}{cells['frame_seconds']:9.4f}"
            f"{cells['read_seconds']:9.4f}{cells['read_speed_up']:7.2f}x"
            + (f"{cells['blocks_left_out']:17.3f}{cells['most_weight_left_out']:10.2g}" if "skip" in name else "")
        )
    if arguments.out:
        report = {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "device": device_name(str(device)),
            "dtype": str(next(model.parameters()).dtype),
            "split": arguments.split,
            **settings,
            "variants": rows,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
