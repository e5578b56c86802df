"""Time and memory per tracked frame: python bench/track.py [--out bench/results/<device>/track.json]

The tracker as it runs by default against the same tracker the way public STM code computes: float32, contiguous NCHW,
batch norm as a layer of its own, the memory concatenated for every frame, the whole affinity at once, the frame's
maps expanded to every object and decoded with each. ResNet-50 network, 2 objects, memories of 1, 5 and 20 frames; both
in one process, their frames timed in alternation. Peak memory comes from one fresh process per version and memory size.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import stm_model.tracking.memory
from stm_kernels import PagedMemory
from stm_model import STM, Tracker
from stm_model.data.synthetic import procedural_clip
from stm_model.network import Query
from stm_model.network.encoders import FrameFeatures
from stm_model.tracking.memory import MemoryRule
from stm_model.tracking.tracker import FrameResult
from stm_model.training.state import initialize

OBJECTS = 2
VERSIONS = ("naive", "default")


class PublicNetwork(STM):
    """A network that decodes as public code does."""

    def segment(self, memory_readout: Tensor, query: Query, objects_per_clip: list[int]) -> Tensor:
        """As `STM.segment`, with the maps of the one frame expanded to all objects before the decoder."""
        objects = len(memory_readout)
        features = FrameFeatures(*(maps.expand(objects, -1, -1, -1) for maps in query.features))
        value = query.value.expand(objects, -1, -1, -1)
        return super().segment(memory_readout, Query(query.key, value, features), [1] * objects)


class PublicMemory(PagedMemory):
    """A memory that is read as public code does: joined for every frame, the whole affinity at once."""

    def read(self, query_key: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """What is read, and zeros for the log-sum-exp, for which public code does not ask."""
        key, value = (torch.cat(parts, 1) for parts in zip(*self.state()["pages"]))
        affinity = torch.softmax(query_key @ key.mT * query_key.shape[2] ** -0.5, -1)
        return affinity @ value, query_key.new_zeros(query_key.shape[:2])


class PublicTracker(Tracker):
    """A tracker whose memory is a `PublicMemory`."""

    def track(self, *inputs: Any, **options: Any) -> Iterator[FrameResult]:
        """As `Tracker.track`."""
        results = super().track(*inputs, **options)
        while True:
            # only while this tracker works: others run in between
            with mock.patch.object(stm_model.tracking.memory, "PagedMemory", PublicMemory):
                result = next(results, None)
            if result is None:
                return
            yield result


def build_tracker(
    version: str,
    device: str,
    memory: MemoryRule | str,
    weights: STM | None = None,
    compiled: bool = False,
    size: int | None = None,
) -> Tracker:
    """The default tracker, or the naive one: float32, NCHW, separate batch norm, whole affinity, expanded maps."""
    model = weights if weights is not None else random_network()
    if version == "naive":
        public = PublicNetwork(model.config)
        public.load_state_dict(model.state_dict())
        public = public.requires_grad_(False).eval().float().to(device, memory_format=torch.contiguous_format)
        tracker = PublicTracker(public, memory=memory, size=size)
        tracker.model = public
        return tracker
    from stm_model.runtime import default_dtype

    model = model.to(device, default_dtype(device), memory_format=torch.channels_last)
    return Tracker(model, memory=memory, compiled=compiled, size=size)


def random_network() -> STM:
    """The released shape with random weights: time and memory do not depend on them."""
    torch.manual_seed(0)
    model = STM()
    initialize(model)
    return model.eval()


def steady_memory(size: int) -> MemoryRule:
    """A rule with which frame `size` and every later one is segmented from `size` remembered frames."""
    return MemoryRule(kept=frozenset(range(size - 1)), first=False, previous=True)


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def track_until(tracker: Tracker, frames: np.ndarray, mask: np.ndarray, size: int) -> Iterator:
    """A track that has gone through the first `size` frames; with a memory of that size the next one reads it all."""
    results = tracker.track((frames[index % len(frames)] for index in range(10**9)), {0: mask})
    for _ in range(size):
        next(results)
    return results


def time_frames(arguments: argparse.Namespace, frames: np.ndarray, mask: np.ndarray, size: int) -> dict:
    """Median seconds per frame of both versions, frames timed in alternation."""
    tracks = {
        version: track_until(build_tracker(version, arguments.device, steady_memory(size)), frames, mask, size)
        for version in VERSIONS
    }
    seconds = {version: [] for version in VERSIONS}
    for repeat in range(arguments.repeats + 1):
        for version, track in tracks.items():
            synchronize(arguments.device)
            start = time.perf_counter()
            next(track)
            synchronize(arguments.device)
            if repeat:
                seconds[version].append(time.perf_counter() - start)
    return {version: {"median": statistics.median(times), "all": times} for version, times in seconds.items()}


def peak_memory(arguments: argparse.Namespace, version: str, size: int) -> int:
    """Peak bytes of a fresh process that tracks, with a memory of `size` frames, as many frames as for the largest."""
    command = [sys.executable, __file__, "--device", arguments.device, "--height", str(arguments.height)]
    command += ["--width", str(arguments.width), "--peak", version, str(size), str(max(arguments.sizes) + 2)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(arguments: argparse.Namespace) -> None:
    """The child's side of `peak_memory`."""
    version, size, count = arguments.peak[0], int(arguments.peak[1]), int(arguments.peak[2])
    frames, labels = procedural_clip(8, (arguments.height, arguments.width), OBJECTS, seed=0)
    track_until(build_tracker(version, arguments.device, steady_memory(size)), frames, labels[0], count)
    on_gpu = torch.device(arguments.device).type == "cuda"
    print(torch.cuda.max_memory_allocated() if on_gpu else peak_of_process())


def peak_of_process() -> int:
    """Most bytes this process ever held; getrusage would count what its parent held when it was started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def agreement(arguments: argparse.Namespace, frames: np.ndarray, mask: np.ndarray) -> float:
    """Least J over objects and frames between the masks of both versions, by the default weights at their own size."""
    from stm_model.evaluation.metrics import region_similarity
    from stm_model.network.weights import network_size

    masks, size = {}, network_size(None, None, frames.shape[1:3])
    for version in VERSIONS:
        weights = STM.load(device=arguments.device, dtype=torch.float32)
        tracker = build_tracker(version, arguments.device, "every:5", weights, size=size)
        masks[version] = [result.labels for result in tracker.track(frames, {0: mask})]
    return min(
        region_similarity(ours == label, naive == label)
        for ours, naive in zip(masks["default"], masks["naive"], strict=True)
        for label in range(1, OBJECTS + 1)
    )


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{model[0].split(':')[1].strip() if model else platform.processor()}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=854)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 5, 20], help="memory sizes in frames")
    parser.add_argument("--repeats", type=int, default=5, help="timed frames per version and size")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        return print_peak(arguments)
    frames, labels = procedural_clip(12, (arguments.height, arguments.width), OBJECTS, seed=0)
    name = device_name(arguments.device)
    print(f"{name}; {arguments.height}×{arguments.width}, {OBJECTS} objects, ResNet-50")
    j = agreement(arguments, frames, labels[0])
    print(f"default weights: masks of both versions agree to J ≥ {j:.4f} on {len(frames)} frames")
    print(f"{'T':>4} {'naive s':>9} {'default s':>10} {'ratio':>7} {'naive peak MiB':>15} {'default peak MiB':>17}")
    rows = []
    for size in arguments.sizes:
        seconds = time_frames(arguments, frames, labels[0], size)
        peak = {version: peak_memory(arguments, version, size) for version in VERSIONS}
        ratio = seconds["naive"]["median"] / seconds["default"]["median"]
        rows.append({"memory_frames": size, "seconds": seconds, "ratio": ratio, "peak_bytes": peak})
        print(
            f"{size:>4} {seconds['naive']['median']:>9.3f} {seconds['default']['median']:>10.3f} {ratio:>6.2f}x"
            f" {peak['naive'] / 2**20:>15.0f} {peak['default'] / 2**20:>17.0f}",
            flush=True,
        )
    grown = {version: rows[-1]["peak_bytes"][version] - rows[0]["peak_bytes"][version] for version in VERSIONS}
    share = grown["default"] / grown["naive"] if grown["naive"] > 0 else float("nan")
    print(f"peak above that of T = {arguments.sizes[0]}: default takes {share:.3f} of what naive takes")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "device": name,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "frame": [arguments.height, arguments.width],
            "objects": OBJECTS,
            "agreement_J": j,
            "peak_share_above_first_size": share,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
