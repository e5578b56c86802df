"""What a long video costs: python bench/long_video.py [--only frames share exact back run] [--out FILE]

frames  what a frame takes, in time and peak memory, over the number T of remembered frames: naively, with everything
        kept, within a budget, and on host pages (on a CPU they only show that nothing is lost); and what appending it
        takes beside torch.cat. Each in a process of its own.
share   a frame after 1000 at the default weights' sizes, of which a tenth of the positions or all are kept, alternated.
exact   a read of 1000 frames against float64, by the yardstick of the tests.
back    a fish that is gone for 500 frames, every frame remembered: J before and after, with everything kept and within
        64 MiB.
run     `stm track` over 10 000 frames of 480×270 and 2 objects, default weights, under a budget of 64 MiB: what its
        process holds and what a frame takes, in the first 1000 frames after the budget is full and in the last 1000.

    python bench/long_video.py --quick --workers 0      # proves the program: tiny sizes, a minute

On a CPU seconds are of processor time, of one thread. What is in FILE already stays, but for the sections done anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import stm_model.tracking.folder
from bench import harness
from bench.harness import MIB, Peak, Result, Task, alternate, clock, run_tasks, table, write_json
from bench.read import errors, naive_read
from bench.tracker import steady_memory
from stm_kernels import PagedMemory
from stm_kernels.testing import make_problem
from stm_model import STM, Tracker
from stm_model.commands.main import main as stm
from stm_model.data.aquarium import aquarium_clip
from stm_model.evaluation.metrics import region_similarity
from stm_model.io.masks import write_mask
from stm_model.io.video import VideoWriter
from stm_model.runtime import held_process_memory
from stm_model.tracking.bank import MemoryBank
from stm_model.tracking.budget import EVICTIONS, MemoryBudget, MemoryRule, budget_page, parse_size

SECTIONS = ("frames", "share", "exact", "back", "run")
READERS = ("naive", "everything kept", *EVICTIONS, "host pages")
LIMIT_SECONDS = 4 * 3600.0
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
    exact: tuple[int, int] = (1000, 48)
    """T and the positions of a frame, where reads are compared with float64."""
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


def build_tasks(arguments: argparse.Namespace) -> dict[str, Task]:
    """All that was asked for, by section and name; the same in every process."""
    device, quick = torch.device(arguments.device), arguments.quick
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = Sizes((30, 54)) if device.type == "cuda" else Sizes()
    gone, video = 500, LongVideo(arguments.frames)
    if quick:
        size = Sizes((4, 6), (1, 8, 32), 8, (40, 12), 16, 24, repeats=2)
        gone, video = 20, LongVideo(120, 10, 8, (32, 48), budget="200KiB", memory="every:1")
    tasks: dict[str, Task] = {
        f"frames, T={count}, {reader}": partial(frame_cost, size, count, reader, device, dtype)
        for count in size.counts
        for reader in READERS
    }
    narrow = Sizes((4, 6), (32,), C=16, V=24, repeats=2) if quick else Sizes(size.grid, (1000,), C=64, V=128, repeats=7)
    tasks[f"share, T={narrow.counts[0]}"] = partial(share_cost, narrow, device, dtype)
    for kind in (torch.float32, torch.bfloat16):
        for share in (None, 0.5, 0.0):
            where = {None: "device", 0.5: "half of it on the host", 0.0: "host"}[share]
            tasks[f"exact, {str(kind).removeprefix('torch.')}, {where}"] = partial(exactness, size, share, device, kind)
    back = replace(video, frames=2 * BACK_FRAMES + gone, window=BACK_FRAMES, memory="every:1")
    tasks[f"back, gone for {gone} frames"] = partial(found_again, back, device)
    tasks[f"run, {video.frames} frames"] = partial(track_long_video, video, device)
    return {name: task for name, task in tasks.items() if name.split(",")[0] in arguments.only}


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
    step, frames, append = (naive_memory if reader == "naive" else our_memory)(size, count, reader, device, dtype)
    seconds: dict[str, list[float]] = {"seconds": [], "append_seconds": []}
    for index in range(size.repeats + 1):
        inputs = frame(size, index, device, dtype)
        for name, work in (("seconds", step), ("append_seconds", append)):
            start = clock(device)
            work(*inputs)
            # the first frame finds caches and pages cold
            seconds[name] += [clock(device) - start] * bool(index)
    found = {"T": count, "reader": reader} | {name: statistics.median(times) for name, times in seconds.items()}
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
) -> tuple[Step, Callable[[], int], Step]:
    """What public code does: concatenate the memory for every frame, hold the affinity whole."""
    key, value, _query = frame(size, 0, device, dtype)
    held = [tensor[:, :, None].repeat(1, 1, count - 1, 1, 1) for tensor in (key, value)]

    def append(key: Tensor, value: Tensor, query: Tensor) -> list[Tensor]:
        return [torch.cat([old, new[:, :, None]], 2) for old, new in zip(held, (key, value))]

    def step(key: Tensor, value: Tensor, query: Tensor) -> None:
        keys, values = (rearrange(tensor, "b c t h w -> b (t h w) c") for tensor in append(key, value, query))
        naive_read(rearrange(query, "b c h w -> b (h w) c"), keys, values, size.C**-0.5)

    return step, lambda: count, append


def our_memory(
    size: Sizes, count: int, reader: str, device: torch.device, dtype: torch.dtype
) -> tuple[Step, Callable[[], int], Step]:
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
    return step, lambda: len(bank.memories[0].notes) // bank.memories[0].positions, append


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


def exactness(size: Sizes, share: float | None, device: torch.device, dtype: torch.dtype) -> Result:
    """A read of a memory that was appended frame by frame, over the error it is allowed: the yardstick of the tests,
    against float64 and beside plain PyTorch in the same dtype. `share` of its pages lie on the device, None is all.
    """
    count, M = size.exact
    problem = make_problem(1, M, count * M, size.C, size.V, dtype=dtype, device=device, peak=3.0)
    on_device = None if share is None else round(share * count / 10)
    memory = PagedMemory(1, size.C, size.V, page_size=10 * M, device_pages=on_device, dtype=dtype, device=device)
    for key, value in zip(problem.memory_key.split(M, 1), problem.memory_value.split(M, 1)):
        memory.append(key, value)
    ratios = errors(problem, lambda query_key, *_, scale: memory.read(query_key, scale=scale, return_lse=True))
    pages = {"device": memory.device_nbytes // memory.page_nbytes, "host": memory.host_nbytes // memory.page_nbytes}
    found = {"T": count, "M": M, "C": size.C, "V": size.V, "pages": pages, "error_over_allowed": max(ratios.values())}
    return found if max(ratios.values()) <= 1 else {"failed": f"error over allowed error: {ratios}"} | found


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
        tracker = Tracker(model, memory=video.memory, size=min(video.size), budget=MemoryBudget(device=budget))
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
    seen: list[Seen] = []

    def write(path: Path, labels: np.ndarray) -> None:
        write_mask(path, labels)
        seen.append(Seen(held_process_memory() or 0, time.perf_counter(), time.process_time()))

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
        for index in tqdm(range(video.frames), desc="write the video", unit="frame", delay=1):
            writer.write(frames[video.clip_index(index)])
    write_mask(folder / "mask.png", labels[0])
    command = ["track", str(folder / "video.mp4"), "--mask", str(folder / "mask.png"), "--out", str(folder / "out")]
    command += ["--size", str(min(video.size)), "--memory", video.memory, "--memory-budget", video.budget]
    return [*command, "--device", str(device)]


class Seen(NamedTuple):
    """When a mask was written: bytes held, seconds of the clock and of the processor."""

    held: int
    seconds: float
    processor: float


def figures(video: LongVideo, seen: list[Seen], full: int) -> dict[str, Any]:
    """Bytes held and seconds a frame, early and late, where the budget is full after so many frames."""

    def over(window: range) -> dict[str, float]:
        # from the mask of the frame before
        within = seen[window.start - 1 : window.stop]
        return {
            "held_bytes": float(np.median([one.held for one in within[1:]])),
            "seconds": float(np.median(np.diff([one.seconds for one in within]))),
            "processor_seconds": (within[-1].processor - within[0].processor) / len(window),
        }

    early, late = map(over, video.windows(full).values())
    ratios = {name: late[name] / early[name] for name in late}
    return {
        "early": early,
        "late": late,
        "late_over_early": ratios,
        "most_held_bytes": max(one.held for one in seen[full:]),
    }


def show(results: dict[str, Result]) -> None:
    """Tables of what is known."""
    known = {name: cell for name, cell in results.items() if not {"failed", "skipped"} & set(cell)}
    frames = [cell for cell in known.values() if "reader" in cell]
    columns = {"seconds": 1, "append_seconds": 1, "peak_bytes": MIB, "frames_in_memory": 1}
    rows = [(cell["reader"], cell["T"], *(cell[name] / unit for name, unit in columns.items())) for cell in frames]
    if rows:
        print(table(("", "T", "seconds a frame", "to append it", "peak MiB", "frames in memory"), rows))
    for name, cell in results.items():
        if name not in known:
            print(f"{name}: {cell.get('failed') or cell.get('skipped')}")
        if "faster" in cell:
            print(f"{name}: {cell['share_seconds']} seconds a frame, {cell['faster']:.2f} times as fast")
        if "error_over_allowed" in cell:
            print(f"{name}: error over allowed {cell['error_over_allowed']:.2f}")
        if "J" in cell:
            print(f"{name}, budget {cell['video']['budget']}")
            print(table(("J", "before", "gone", "back"), [(key, *found.values()) for key, found in cell["J"].items()]))
        if "late_over_early" in cell:
            print(f"{name}, budget {cell['video']['budget']}, full after {cell['full_after_frames']} frames")
            rows = [(key, cell["early"][key], cell["late"][key], over) for key, over in cell["late_over_early"].items()]
            print(table(("", "early", "late", "late over early"), rows))


def main(words: Sequence[str] | None = None) -> int:
    parser = harness.options(__doc__, threads=1)
    parser.add_argument(
        "--frames", type=harness.at_least(3000), default=10_000, help="length of the long run, at least 3000"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help="%(choices)s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to prove the program")
    parser.add_argument("--workers", type=int, default=1, choices=(0, 1), help="0 does everything in this process")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {"results": {}}
    if arguments.out and arguments.out.exists():
        report = json.loads(arguments.out.read_text())
    results = report["results"]
    for name in [name for name in results if name.split(",")[0] in arguments.only]:
        del results[name]
    report |= {section: harness.describe(arguments.device) for section in arguments.only}

    def tell(name: str, result: Result) -> None:
        results[name] = result
        write_json(report, arguments.out)
        print(f"{name}: {'done' if not {'failed', 'skipped'} & set(result) else result}", file=sys.stderr, flush=True)

    tasks = build_tasks(arguments)
    for name, task in tasks.items():
        # a process for each: a peak is of all that a process ever did
        run_tasks({name: task}, tell, processes=arguments.workers, limit=LIMIT_SECONDS)
    show(results)
    return int(any("failed" in results[name] for name in tasks))


if __name__ == "__main__":
    sys.exit(main())
