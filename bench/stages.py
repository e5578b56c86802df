"""Where a tracked frame's time goes: python bench/stages.py [--out bench/results/<device>/stages.json]

A video file in, masks and an overlay out, 480×854, 2 objects, the ResNet-50 network, a memory of 20 frames: the stages
of the default tracker and of the naive one of bench/track.py, frame by frame in alternation in one process, one stage
after the other. Medians of the seconds of each stage on the wall and on the processor; a table, a JSON and a stacked
picture beside it. Then frames a second of whole pipelines, in alternation too: the naive one decodes, tracks and writes
in turn, the default one side by side, as `stm track` does.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import stm_model.tracking.tracker
from bench.track import OBJECTS, VERSIONS, agreement, build_tracker, device_name, steady_memory, synchronize
from bench.workers import write_json
from stm_model.data.synthetic import procedural_clip
from stm_model.io.images import overlay, write_mask
from stm_model.io.threads import Ahead, Behind
from stm_model.io.video import VideoWriter, open_video

STAGES = ("decode", "query encoder", "memory encoder", "read", "decoder", "aggregation", "resize, labels", "write")
COLOURS = ("#999999", "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#f0e442", "#cc79a7", "#444444")
FILE_FRAMES = 24


class Clock:
    """Seconds of the stages of one frame, on the wall and on the processor."""

    def __init__(self, device: str):
        self.device = device
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what the block takes."""
        synchronize(self.device)
        wall, processor = time.perf_counter(), time.process_time()
        yield
        synchronize(self.device)
        for place, seconds in enumerate((time.perf_counter() - wall, time.process_time() - processor)):
            self.spent[name][place] += seconds

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, what it takes counted."""

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with self.stage(name):
                return function(*arguments, **options)

        return call

    def take(self) -> dict[str, list[float]]:
        """What was counted since the last call."""
        spent = {name: self.spent[name] for name in (*STAGES, "track")}
        self.spent.clear()
        # of tracking, what no named stage took
        inside = zip(*(spent[name] for name in STAGES[1:6]))
        spent["resize, labels"] = [max(0.0, whole - sum(parts)) for whole, parts in zip(spent.pop("track"), inside)]
        return spent


class Pipeline:
    """A version's video file, tracker and output; its memory already holds the frames it is to be timed with."""

    def __init__(self, version: str, arguments: argparse.Namespace, video: Path, mask: np.ndarray, out: Path):
        self.clock = Clock(arguments.device)
        self.tracker = build_tracker(
            version, arguments.device, steady_memory(arguments.frames), compiled=arguments.compile
        )
        self.source = itertools.chain.from_iterable(open_video(video) for _ in itertools.count())
        self.waiting: list[np.ndarray] = []
        self.track = self.tracker.track((self.waiting.pop() for _ in itertools.count()), {0: mask})
        self.out = out
        out.mkdir()
        self.written = VideoWriter(out / "overlay.mp4")
        for _ in range(arguments.frames):
            self.step()
        model, bank = self.tracker.model, self.tracker.bank
        for owner, name, stage in (
            (model, "encode_query", "query encoder"),
            (model, "memorize", "memory encoder"),
            (model, "segment", "decoder"),
            (bank, "read", "read"),
        ):
            setattr(owner, name, self.clock.timed(stage, getattr(owner, name)))
        self.clock.take()

    def step(self) -> dict[str, list[float]]:
        """Decode, track and write a frame; the seconds of its stages."""
        aggregate = self.clock.timed("aggregation", stm_model.tracking.tracker.soft_aggregate)
        with self.clock.stage("decode"):
            frame = next(self.source)
        self.waiting.append(frame)
        with self.clock.stage("track"), mock.patch.object(stm_model.tracking.tracker, "soft_aggregate", aggregate):
            result = next(self.track)
        with self.clock.stage("write"):
            self.write(iter([(result.index, result.labels, frame)]))
        return self.clock.take()

    def write(self, items: Iterator[tuple[int, np.ndarray, np.ndarray]]) -> None:
        """Write masks and overlays."""
        for index, labels, frame in items:
            write_mask(self.out / f"{index:05d}.png", labels)
            self.written.write(overlay(frame, labels))

    def side_by_side(self) -> Iterator[None]:
        """Track with decoding and writing in threads of their own; every step is one frame."""
        with Ahead(self.source) as ahead, Behind(self.write) as behind:
            for frame in ahead:
                self.waiting.append(frame)
                result = next(self.track)
                behind.put((result.index, result.labels, frame))
                yield


def make_video(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A procedural clip as a video file; returns its first mask."""
    frames, labels = procedural_clip(FILE_FRAMES, size, OBJECTS, seed=0)
    with VideoWriter(path) as video:
        for frame in frames:
            video.write(frame)
    return labels[0]


def time_stages(pipelines: dict[str, Pipeline], repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Median seconds of each stage, by version."""
    found: dict[str, list[dict[str, list[float]]]] = {version: [] for version in pipelines}
    for repeat in range(repeats + 1):
        for version, pipeline in pipelines.items():
            seconds = pipeline.step()
            if repeat:
                found[version].append(seconds)
    return {
        version: {
            stage: dict(zip(("wall", "processor"), map(statistics.median, zip(*(frame[stage] for frame in frames)))))
            for stage in STAGES
        }
        for version, frames in found.items()
    }


def time_pipelines(pipelines: dict[str, Pipeline], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of a frame from file to files, by version."""
    overlapped = pipelines["default"].side_by_side()
    steps = {"naive": pipelines["naive"].step, "default": lambda: next(overlapped)}
    seconds: dict[str, list[float]] = {version: [] for version in steps}
    for repeat in range(repeats + 1):
        for version, step in steps.items():
            start = time.perf_counter()
            step()
            synchronize(device)
            if repeat:
                seconds[version].append(time.perf_counter() - start)
    overlapped.close()
    return {version: statistics.median(times) for version, times in seconds.items()}


def draw(found: dict[str, dict[str, dict[str, float]]], title: str, path: Path) -> None:
    """A bar for each version, its stages stacked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    for row, version in enumerate(reversed(found)):
        left = 0.0
        for stage, colour in zip(STAGES, COLOURS):
            seconds = found[version][stage]["wall"]
            axes.barh(row, seconds, left=left, color=colour, label=stage if row == 0 else None)
            if seconds > 0.12 * sum(part["wall"] for part in found["naive"].values()):
                axes.text(left + seconds / 2, row, f"{seconds:.2f}", ha="center", va="center", color="white")
            left += seconds
        axes.text(left, row, f" {left:.2f} s", va="center")
    axes.set_yticks(range(len(found)), list(reversed(found)))
    axes.margins(x=0.08)
    axes.set_xlabel("seconds a frame")
    axes.set_title(title, fontsize=9)
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.28), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(options: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=854)
    parser.add_argument("--frames", type=int, default=20, help="memory frames")
    parser.add_argument("--repeats", type=int, default=5, help="timed frames of each version")
    parser.add_argument("--compile", action="store_true", help="compile the default tracker's network first")
    parser.add_argument("--out", type=Path, help="JSON file to write, with a picture beside it")
    arguments = parser.parse_args(options)
    size = (arguments.height, arguments.width)
    name = device_name(arguments.device)
    title = f"{name}; {size[0]}×{size[1]}, {OBJECTS} objects, {arguments.frames} memory frames, ResNet-50"
    title += ", default compiled" if arguments.compile else ""
    frames, labels = procedural_clip(12, size, OBJECTS, seed=0)
    j = agreement(arguments, frames, labels[0])
    print(f"{title}\ndefault weights: masks of both versions agree to J ≥ {j:.4f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder, "clip.mp4")
        mask = make_video(video, size)
        pipelines = {version: Pipeline(version, arguments, video, mask, Path(folder, version)) for version in VERSIONS}
        found = time_stages(pipelines, arguments.repeats)
        whole = time_pipelines(pipelines, arguments.repeats, arguments.device)
        for pipeline in pipelines.values():
            pipeline.written.close()
    print(f"{'':16}" + "".join(f"{version:>9} s {'cpu s':>9}" for version in found) + f"{'faster':>9}")
    for stage in STAGES:
        naive, default = (found[version][stage] for version in ("naive", "default"))
        cells = "".join(f"{seconds['wall']:11.4f} {seconds['processor']:9.4f}" for seconds in (naive, default))
        print(f"{stage:16}{cells}{naive['wall'] / max(default['wall'], 1e-9):8.2f}x")
    ratio = whole["naive"] / whole["default"]
    for version, seconds in whole.items():
        print(f"{version:8} {1 / seconds:7.2f} frames a second from file to files")
    print(f"{ratio:.2f} times the frames a second")
    if arguments.out:
        report = {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "device": name,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "frame": size,
            "objects": OBJECTS,
            "memory_frames": arguments.frames,
            "agreement_J": j,
            "stages": found,
            "pipeline_seconds": whole,
            "ratio": ratio,
        }
        write_json(report, arguments.out)
        draw(found, title, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
