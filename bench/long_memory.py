"""What a long memory costs: a frame's read and append over the number of remembered frames, and whether it is exact."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from bench.machine import Peak, clock
from bench.timing import call_seconds
from bench.track import steady_memory
from bench.workers import Result, Task
from stm_kernels import PagedMemory
from stm_kernels.testing import draw_problem, make_problem, sample_of
from stm_model.tracking.budget import MemoryBudget, budget_page
from stm_model.tracking.memory import MemoryBank, MemoryRule

READERS = ("naive", "everything kept", "fifo", "importance", "host pages")


@dataclass(frozen=True)
class Sizes:
    """What is remembered."""

    grid: tuple[int, int]
    """Positions of a frame: height and width."""
    counts: tuple[int, ...]
    """T, numbers of remembered frames."""
    budget: int
    """Frames whose bytes are the budget of the device."""
    exact: tuple[int, int]
    """T and the positions of a frame, where reads are compared with float64."""
    C: int = 128
    """Key channels, as in the released network."""
    V: int = 512
    """Value channels, likewise."""
    repeats: int = 3
    """Frames timed at each T."""

    @property
    def M(self) -> int:
        """Positions of a frame."""
        return self.grid[0] * self.grid[1]

    def frame_bytes(self, dtype: torch.dtype) -> int:
        """Of keys and values of a frame."""
        return self.M * (self.C + self.V) * dtype.itemsize

    def budget_bytes(self, dtype: torch.dtype) -> int:
        """The budget in bytes, of whole pages of one frame each."""
        page = budget_page(0, self.M, 1)
        return -(-self.budget * self.M // page) * page * (self.C + self.V) * dtype.itemsize


def sizes(device: torch.device, quick: bool) -> Sizes:
    """On a CPU a frame has the size at which the default weights run, 432×240; on a GPU 854×480."""
    if quick:
        return Sizes((4, 6), (1, 8, 32), 8, (40, 12), 16, 24, repeats=2)
    grid = (30, 54) if device.type == "cuda" else (15, 27)
    return Sizes(grid, (1, 4, 16, 64, 256, 1000), 64, (1000, 48))


def memory_tasks(device: torch.device, dtype: torch.dtype, quick: bool) -> dict[str, dict[str, Task]]:
    """All of this file, by section and name."""
    size = sizes(device, quick)
    frames = {
        f"T={count}, {reader}": partial(frame_cost, size, count, reader, device, dtype)
        for count in size.counts
        for reader in READERS
    }
    exact = {
        f"{str(kind).removeprefix('torch.')}, {where}": partial(exactness, size, where, device, kind)
        for kind in (torch.float32, torch.bfloat16)
        for where in ("device", "half of it on the host", "host")
    }
    return {
        "frames": frames,
        "append": {"append": partial(append_cost, size, device, dtype)},
        "exact": exact,
        "host pages": {"host pages": partial(host_floor, size, device, dtype, quick)},
    }


def frame_cost(size: Sizes, count: int, reader: str, device: torch.device, dtype: torch.dtype) -> Result:
    """Seconds of a frame that is appended and read with T frames in memory, and the peak of the process beyond what it
    held before the first one.
    """
    peak = Peak(device)
    warm_up(device, dtype)
    before = peak.reset()
    step, frames = (naive_memory if reader == "naive" else our_memory)(size, count, reader, device, dtype)
    seconds = []
    for index in range(size.repeats + 1):
        key, value, query = frame(size, index, device, dtype)
        start = clock(device)
        step(key, value, query)
        # the first frame finds caches and pages cold
        seconds += [clock(device) - start] * bool(index)
    found = {"T": count, "reader": reader, "seconds": statistics.median(seconds), "least": min(seconds)}
    return found | {"peak_bytes": peak.read() - before, "frames_in_memory": frames()}


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Let libraries load their code, which is no cost of a memory."""
    small = Sizes((2, 2), (), 1, (0, 0), 16, 16)
    for make in (naive_memory, our_memory):
        make(small, 2, "importance", device, dtype)[0](*frame(small, 0, device, dtype))


def frame(size: Sizes, index: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Key `[1, C, h, w]`, value `[1, V, h, w]` and query key `[1, C, h, w]` of a frame, normally distributed."""
    generator = torch.Generator(device).manual_seed(index)
    return tuple(
        torch.randn(1, channels, *size.grid, generator=generator, device=device).to(dtype)
        for channels in (size.C, size.V, size.C)
    )


Step = Callable[[Tensor, Tensor, Tensor], Any]


def naive_memory(
    size: Sizes, count: int, _: str, device: torch.device, dtype: torch.dtype
) -> tuple[Step, Callable[[], int]]:
    """What public code does: concatenate the memory for every frame, hold the affinity whole."""
    key, value, _ = frame(size, 0, device, dtype)
    held = [tensor[:, :, None].repeat(1, 1, count - 1, 1, 1) for tensor in (key, value)]

    def step(key: Tensor, value: Tensor, query: Tensor) -> None:
        keys, values = (torch.cat([old, new[:, :, None]], 2) for old, new in zip(held, (key, value)))
        keys, values = (rearrange(tensor, "b c t h w -> b (t h w) c") for tensor in (keys, values))
        query = rearrange(query, "b c h w -> b (h w) c")
        torch.softmax(query @ keys.mT * size.C**-0.5, -1) @ values

    return step, lambda: count


def our_memory(
    size: Sizes, count: int, reader: str, device: torch.device, dtype: torch.dtype
) -> tuple[Step, Callable[[], int]]:
    """A tracker's memory: all kept on the device, within a budget, or beyond it on the host."""
    limit = size.budget_bytes(dtype)
    budget = {
        "everything kept": MemoryBudget(),
        "fifo": MemoryBudget(device=limit),
        "importance": MemoryBudget(device=limit, eviction="importance"),
        "host pages": MemoryBudget(device=limit, host=2**50),
    }[reader]
    # where nothing is evicted a new frame takes the place of the newest, so that T stays
    evicts = reader in ("fifo", "importance") and count > size.budget
    bank = MemoryBank(MemoryRule.parse("every:1") if evicts else steady_memory(count), budget)
    bank.add_objects(1)

    def remember(index: int, key: Tensor, value: Tensor) -> None:
        bank.remember(index, [index == 0], [True], bank.wanted(index, [index == 0], [True]), key, value)

    with torch.inference_mode():
        key, value, _ = frame(size, 0, device, dtype)
        for index in range(count - 1):
            remember(index, key, value)
    indices = iter(range(count - 1, 10**9))

    @torch.inference_mode()
    def step(key: Tensor, value: Tensor, query: Tensor) -> None:
        remember(next(indices), key, value)
        bank.read(query)

    return step, lambda: len(bank.memories[0].frames)


def append_cost(size: Sizes, device: torch.device, dtype: torch.dtype) -> Result:
    """Seconds to append a frame to a memory of T frames, in pages and by torch.cat."""
    C, V, M = size.C, size.V, size.M
    memory = PagedMemory(1, C, V, dtype=dtype, device=device)
    key, value, _ = (rearrange(tensor, "b c h w -> b (h w) c") for tensor in frame(size, 0, device, dtype))
    seconds = []
    for _ in range(size.counts[-1] + 1):
        start = clock(device)
        memory.append(key, value)
        seconds.append(clock(device) - start)
    rows = []
    for before, count in pairwise([0, *size.counts]):
        held = [torch.randn(1, count * M, channels, device=device).to(dtype) for channels in (C, V)]
        joined = []
        for _ in range(size.repeats + 1):
            start = clock(device)
            grown = [torch.cat(pair, 1) for pair in zip(held, (key, value))]
            joined.append(clock(device) - start)
            del grown
        # a new page costs its allocation; the greatest since the last row shows it
        since = seconds[before + 1 : count + 1]
        rows.append({"T": count, "pages": statistics.median(since), "pages_most": max(since)})
        rows[-1]["cat"] = statistics.median(joined[1:])
    return {"rows": rows, "page_positions": memory.page_size, "frame_bytes": size.frame_bytes(dtype)}


def exactness(size: Sizes, where: str, device: torch.device, dtype: torch.dtype) -> Result:
    """A read of a memory that was appended frame by frame, over the error it is allowed: the yardstick of the tests,
    against float64 and beside plain PyTorch in the same dtype.
    """
    count, M = size.exact
    problem = make_problem(1, M, count * M, size.C, size.V, dtype=dtype, device=device, peak=3.0)
    page = 10 * M
    on_device = {"device": None, "host": 0}.get(where, count // 20)
    memory = PagedMemory(1, size.C, size.V, page_size=page, device_pages=on_device, dtype=dtype, device=device)
    for key, value in zip(problem.memory_key.split(M, 1), problem.memory_value.split(M, 1)):
        memory.append(key, value)
    found = dict(zip(("out", "lse"), memory.read(problem.query_key, scale=problem.scale, return_lse=True)))
    ratios = sample_of(problem, M).ratios(found)
    pages = {"device": memory.device_nbytes // memory.page_nbytes, "host": memory.host_nbytes // memory.page_nbytes}
    result = {"T": count, "M": M, "C": size.C, "V": size.V, "pages": pages, "error_over_allowed": ratios}
    return result if max(ratios.values()) <= 1 else {"failed": f"error over allowed error: {ratios}"} | result


def host_floor(size: Sizes, device: torch.device, dtype: torch.dtype, dry: bool) -> Result:
    """A read with all pages but one in the host's memory, beside the larger of two times that it cannot go below: that
    of the copy of these pages, and that of the read with all of them on the device.
    """
    if device.type != "cuda" and not dry:
        return {"skipped": "needs a GPU: on a CPU the host's memory is the device's"}
    count = size.counts[-1]
    problem = draw_problem(1, size.M, count * size.M, size.C, size.V, dtype=dtype, device=device)
    page = -(-size.M // 128) * 128 * (1 if dry else 8)
    memories = {}
    for name, on_device in (("device", None), ("host", 1)):
        memories[name] = PagedMemory(
            1, size.C, size.V, page_size=page, device_pages=on_device, dtype=dtype, device=device
        )
        memories[name].append(problem.memory_key, problem.memory_value)
    seconds = {
        name: statistics.median(call_seconds([partial(memory.read, problem.query_key)], device))
        for name, memory in memories.items()
    }
    moved, one = memories["host"].host_nbytes, memories["host"].page_nbytes
    source = torch.zeros(one, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(one, dtype=torch.uint8, device=device)

    def copy() -> None:
        for _ in range(moved // one):
            target.copy_(source, non_blocking=True)

    seconds["copy"] = statistics.median(call_seconds([copy], device))
    floor = max(seconds["device"], seconds["copy"])
    rate = moved / seconds["copy"] / 1e9
    found = {"T": count, "M": size.M, "host_bytes": moved, "copy_gigabytes_per_second": rate, "dry": dry}
    return found | {"seconds": seconds, "floor_seconds": floor, "over_floor": seconds["host"] / floor - 1}
