"""What a long video costs: python bench/long_video.py [--only frames share back run] [--out FILE]

frames  what a frame takes, in time and peak memory, over the number T of remembered frames: naively, with everything
        kept, within a budget, and on host pages (on a CPU they only show that nothing is lost).
share   a frame after 1000 at the default weights' sizes, of which a tenth of the positions or all are kept, alternated.
back    a fish that is gone for 500 frames, every frame remembered: J before and after, with everything kept and within
        64 MiB.
run     `stm track` over 10 000 frames of 480×270 and 2 objects, default weights, under a budget of 64 MiB: what its
        process holds and what a frame takes, in the first 1000 frames after the budget is full and in the last 1000.

Each figure is of a process of its own. On a CPU seconds are of processor time, of one thread.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import stm_model.tracking.folder
from bench.harness import MIB, Peak, Result, Task, alternate, apart, clock, describe, options, table, write_json
from bench.read import naive_read
from bench.tracker import steady_memory
from stm_model import STM, Tracker
from stm_model.commands.main import main as stm
from stm_model.data.aquarium import aquarium_clip
from stm_model.evaluation.metrics import region_similarity
from stm_model.io.masks import write_mask
from stm_model.io.video import VideoWriter
from stm_model.runtime import held_process_memory
from stm_model.tracking.bank import MemoryBank
from stm_model.tracking.budget import EVICTIONS, MemoryBudget, MemoryRule, budget_page, parse_size

SECTIONS = ("frames", "share", "back", "run")
READERS = ("naive", "everything kept", *EVICTIONS, "host pages")
BACK_FRAMES = 24
"""Frames before an object is gone, and after."""

Step = Callable[[Tensor, Tensor, Tensor], Any]


@dataclass(frozen=True)
class Sizes:
    """What is remembered."""

    grid: tuple[int, int] = (15, 27)
    """Positions of a frame, height and width: by default those of 432×240 pixels."""
    counts: tuple[int, ...] = (1, 4, 16, 64, 256, 1000)
    """T, numbers of remembered frames."""
    budget: int = 64
    """Frames whose bytes are the budget of the device."""
    C: int = 128
    V: int = 512
    repeats: int = 3
    """Frames timed at each T."""

    def budget_bytes(self, dtype: torch.dtype) -> int:
        """The budget, of whole pages of one frame each."""
        positions = self.grid[0] * self.grid[1]
        page = budget_page(0, positions, 1)
        return -(-self.budget * positions // page) * page * (self.C + self.V) * dtype.itemsize


@dataclass(frozen=True)
class LongVideo:
    """A clip that is played forwards and backwards in turn, as one continuous video, and how it is tracked."""

    frames: int = 10_000
    window: int = 1000
    """Frames compared, after the budget is full and last."""
    clip: int = 48
    """Frames of the clip."""
    size: tuple[int, int] = (270, 480)
    """Height and width in pixels."""
    objects: int = 2
    gone: int = 500
    """Frames without one of the objects, where it goes."""
    budget: str = "64MiB"
    memory: str = "first+every:5"

    def windows(self, full: int) -> dict[str, range]:
        """The frames compared, where the budget is full after so many."""
        late = range(self.frames - self.window, self.frames)
        return {"early": range(full + 1, full + 1 + self.window), "late": late}

    def clip_index(self, frame: int) -> int:
        """The clip's frame that a frame of the video shows: the first and the last not twice in a row."""
        place = frame % (2 * self.clip - 2)
        return min(place, 2 * self.clip - 2 - place)


def build_tasks(size: Sizes, video: LongVideo, device: torch.device) -> dict[str, Task]:
    """All sections, by section and name."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tasks: dict[str, Task] = {
        f"frames, T={count}, {reader}": partial(frame_cost, size, count, reader, device, dtype)
        for count in size.counts
        for reader in READERS
    }
    # the channels of the default weights
    narrow = replace(size, counts=size.counts[-1:], C=size.C // 2, V=size.V // 4, repeats=2 * size.repeats + 1)
    tasks[f"share, T={narrow.counts[0]}"] = partial(share_cost, narrow, device, dtype)
    back = replace(video, frames=2 * BACK_FRAMES + video.gone, window=BACK_FRAMES, memory="every:1")
    tasks[f"back, gone for {video.gone} frames"] = partial(found_again, back, device)
    tasks[f"run, {video.frames} frames"] = partial(track_long_video, video, device)
    return tasks


def frame_cost(size: Sizes, count: int, reader: str, device: torch.device, dtype: torch.dtype) -> Result:
    """Seconds of a frame that is appended and read with T frames in memory, and the peak of the process beyond what it
    held before the first one.
    """
    # libraries load their code at the first call
    small = Sizes((2, 2), (), 1, C=16, V=16)
    for make in (naive_memory, our_memory):
        make(small, 2, EVICTIONS[0], device, dtype)[0](*frame(small, 0, device, dtype))
    peak = Peak(device)
    before = peak.reset()
    step, frames = (naive_memory if reader == "naive" else our_memory)(size, count, reader, device, dtype)
    seconds = []
    for index in range(size.repeats + 1):
        inputs = frame(size, index, device, dtype)
        start = clock(device)
        step(*inputs)
        seconds.append(clock(device) - start)
    # the first frame finds caches and pages cold
    found = {"T": count, "reader": reader, "seconds": statistics.median(seconds[1:])}
    return found | {"peak_bytes": peak.read() - before, "frames_in_memory": frames()}


def frame(size: Sizes, index: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Key `[1, C, h, w]`, value `[1, V, h, w]` and query key `[1, C, h, w]` of a frame, normally distributed."""
    generator = torch.Generator(device).manual_seed(index)
    return tuple(
        torch.randn(1, channels, *size.grid, generator=generator, device=device).to(dtype)
        for channels in (size.C, size.V, size.C)
    )


def naive_memory(
    size: Sizes, count: int, _: str, device: torch.device, dtype: torch.dtype
) -> tuple[Step, Callable[[], int]]:
    """What public code does: concatenate the memory for every frame, hold the affinity whole."""
    held = [tensor[:, :, None].repeat(1, 1, count - 1, 1, 1) for tensor in frame(size, 0, device, dtype)[:2]]

    def step(key: Tensor, value: Tensor, query: Tensor) -> None:
        joined = [torch.cat([old, new[:, :, None]], 2) for old, new in zip(held, (key, value))]
        keys, values = (rearrange(tensor, "b c t h w -> b (t h w) c") for tensor in joined)
        naive_read(rearrange(query, "b c h w -> b (h w) c"), keys, values, size.C**-0.5)

    return step, lambda: count


def our_memory(
    size: Sizes, count: int, reader: str, device: torch.device, dtype: torch.dtype
) -> tuple[Step, Callable[[], int]]:
    """A tracker's memory: all kept on the device, within a budget, or beyond it on the host."""
    limit = size.budget_bytes(dtype)
    budget = {
        "everything kept": MemoryBudget(),
        "host pages": MemoryBudget(device=limit, host=2**50),
        "a tenth kept": MemoryBudget(share=0.1),
    }.get(reader) or MemoryBudget(device=limit, eviction=reader)
    # where nothing is evicted a new frame takes the place of the newest, so that T stays
    evicts = reader == "a tenth kept" or reader in EVICTIONS and count > size.budget
    bank = MemoryBank(MemoryRule.parse("every:1") if evicts else steady_memory(count), budget)
    bank.add_objects(1)
    indices = iter(range(10**9))

    @torch.inference_mode()
    def append(key: Tensor, value: Tensor, query: Tensor) -> None:
        index = next(indices)
        bank.remember(index, bank.wanted(index, [index == 0], [True]), key, value)

    @torch.inference_mode()
    def step(key: Tensor, value: Tensor, query: Tensor) -> None:
        append(key, value, query)
        bank.read(query)

    for _ in range(count - 1):
        append(*frame(size, 0, device, dtype))
    return step, lambda: len(bank.memories[0].notes) // bank.memories[0].positions


def share_cost(size: Sizes, device: torch.device, dtype: torch.dtype) -> Result:
    """What a frame takes, appended, made room for and read, after so many, in alternation."""
    readers = ("everything kept", "a tenth kept")
    made = {reader: our_memory(size, size.counts[0], reader, device, dtype) for reader in readers}
    inputs = frame(size, 1, device, dtype)
    times = alternate({reader: partial(made[reader][0], *inputs) for reader in readers}, size.repeats, device)
    seconds = {reader: time["processor" if device.type == "cpu" else "median"] for reader, time in times.items()}
    kept = {reader: made[reader][1]() for reader in readers}
    faster = seconds[readers[0]] / seconds[readers[1]]
    sizes = {"T": size.counts[0], "M": size.grid[0] * size.grid[1], "C": size.C, "V": size.V}
    return sizes | {"frames_in_memory": kept, "share_seconds": seconds, "faster": faster}


def found_again(video: LongVideo, device: torch.device) -> Result:
    """Mean J of a fish before it goes, and after it is back: for `window` frames each."""
    frames, labels = aquarium_clip(video.clip, video.size, 2)
    # the same fish and scenery without the second fish
    alone = aquarium_clip(video.clip, video.size, 1)[0]
    present = [not video.window <= index < video.frames - video.window for index in range(video.frames)]
    places = [video.clip_index(index) for index in range(video.frames)]
    scores: dict[str, dict[str, float]] = {}
    kept = {}
    for name, budget in {"everything kept": None, "budget": parse_size(video.budget)}.items():
        model = STM.load(device=device)
        limit = MemoryBudget(device=budget)
        tracker = Tracker(model, memory=video.memory, size=min(video.size), budget=limit, spacing=1)
        shown = ((frames if there else alone)[place] for place, there in zip(places, present))
        found = [result.labels == 2 for result in tracker.track(shown, {0: labels[0]})]
        true = [(labels[place] == 2) & there for place, there in zip(places, present)]
        J = list(map(region_similarity, found, true))
        parts = {"before": slice(1, video.window), "gone": slice(video.window, -video.window)}
        parts["back"] = slice(-video.window, None)
        scores[name] = {part: statistics.mean(J[where]) for part, where in parts.items()}
        kept[name] = tracker.bank.summary() if tracker.bank else {}
    return {"video": asdict(video), "memory": kept, "J": scores}


def track_long_video(video: LongVideo, device: torch.device) -> Result:
    """Track a long video as `stm track` does, and what this process held and took over time."""
    seen: list[tuple[float, float, float]] = []

    def write(path: Path, labels: np.ndarray) -> None:
        write_mask(path, labels)
        seen.append((held_process_memory() or 0, time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder:
        command = prepare(video, Path(folder), device)
        with mock.patch.object(stm_model.tracking.folder, "write_mask", write):
            code = stm(command)
        if code:
            return {"failed": f"stm track ended with code {code}"}
        memory = json.loads((Path(folder) / "out" / "summary.json").read_text())["memory"]
    # frames are remembered evenly, and what is kept in the end is what the budget holds
    kept, dropped = memory["positions_kept"], memory["positions_dropped"]
    full = (video.frames - 1) * kept // (kept + dropped)
    windows = {name: [window.start, window.stop] for name, window in video.windows(full).items()}
    found = {"video": asdict(video), "windows": windows, "memory": memory, "full_after_frames": full}
    return found | figures(video, seen, full)


def prepare(video: LongVideo, folder: Path, device: torch.device) -> list[str]:
    """Write the video and its mask; the command that tracks it."""
    frames, labels = aquarium_clip(video.clip, video.size, video.objects)
    with VideoWriter(folder / "video.mp4") as writer:
        for index in range(video.frames):
            writer.write(frames[video.clip_index(index)])
    write_mask(folder / "mask.png", labels[0])
    command = ["track", str(folder / "video.mp4"), "--mask", str(folder / "mask.png"), "--out", str(folder / "out")]
    command += ["--size", str(min(video.size)), "--memory", video.memory, "--memory-budget", video.budget]
    return [*command, "--device", str(device)]


def figures(video: LongVideo, seen: list[tuple[float, float, float]], full: int) -> dict[str, Any]:
    """Bytes held and seconds a frame, early and late, where the budget is full after so many frames.

    `seen` is what was known when each mask was written: bytes held, seconds of the clock and of the processor.
    """

    def over(window: range) -> dict[str, float]:
        # from the mask of the frame before
        held, seconds, processor = np.array(seen[window.start - 1 : window.stop]).T
        return {
            "held_bytes": float(np.median(held[1:])),
            "seconds": float(np.median(np.diff(seconds))),
            "processor_seconds": float(np.diff(processor).mean()),
        }

    early, late = map(over, video.windows(full).values())
    ratios = {name: late[name] / early[name] for name in late}
    most = max(held for held, *_ in seen[full:])
    return {"early": early, "late": late, "late_over_early": ratios, "most_held_bytes": most}


def main(
    words: Sequence[str] | None = None,
    size: Sizes | None = None,
    video: LongVideo | None = None,
    run: Callable[[Task], Result] = apart,
) -> int:
    parser = options(__doc__, threads=1)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help="%(choices)s")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    size = size or (Sizes((30, 54)) if device.type == "cuda" else Sizes())
    report: dict[str, Any] = describe(device) | {"results": {}}
    rows = []
    for name, task in build_tasks(size, video or LongVideo(), device).items():
        if name.split(",")[0] in arguments.only:
            report["results"][name] = found = run(task)
            print(f"{name}: {json.dumps(found)}", flush=True)
            write_json(report, arguments.out)
            if "reader" in found:
                cost = (found["seconds"], found["peak_bytes"] / MIB, found["frames_in_memory"])
                rows.append((found["reader"], found["T"], *cost))
    print(table(("", "T", "seconds a frame", "peak MiB", "frames in memory"), rows))
    return int(any("failed" in found for found in report["results"].values()))


if __name__ == "__main__":
    sys.exit(main())
