"""Ceilings and times of bench/gpu.py: a large product, a copy, every reader at every size, what choosing saves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_checks import backward_tiles_of, chosen, dtypes_of, name_of, skip_ratios, tiles_of, wrong
from bench.gpu_peers import OURS, PEERS, SLOW_TO_COMPILE, call_seconds, naive
from bench.harness import Result, Task
from bench.problems import draw_problem, sample_of
from stm_kernels import PagedMemory, memory_read, memory_usage
from stm_kernels.operator import read_operator
from stm_kernels.testing import (
    Problem,
    allowed_error_shares,
    error_ratios,
    extra_memory,
    read_by,
    results,
)

# logits that float64 and six copies of them fit beside everything else
KNOWN_LOGITS = 2**28
JUDGED_POSITIONS = 4096
MAX_INPUT_SETS = 200
DIRECTIONS = ("forward", "forward+backward")
CHOICES: dict[str, dict[str, Any]] = {
    "exact": {},
    "skip=1e-3": {"skip": 1e-3},
    "skip=1e-2": {"skip": 1e-2},
    "top_k=30": {"top_k": 30},
    "top_k=50": {"top_k": 50},
}


@dataclass(frozen=True)
class Size:
    """A read of `B` objects: a frame of `M` positions asks a memory of `T` such frames."""

    M: int
    """Positions of a frame."""
    T: int
    """Frames in the memory."""
    B: int = 1
    """Objects, each with keys of its own."""
    C: int = 128
    """Key channels."""
    V: int = 512
    """Value channels."""

    @property
    def N(self) -> int:
        """Memory positions."""
        return self.M * self.T

    def __str__(self) -> str:
        return f"M={self.M} T={self.T} B={self.B}"

    def flops(self, direction: str) -> float:
        """The operations that no algorithm can do without: forward two products, backward five."""
        pairs = 2.0 * self.B * self.M * self.N
        forward = pairs * (self.C + self.V)
        return forward if direction == "forward" else forward + pairs * (3 * self.C + 2 * self.V)

    def input_bytes(self, dtype: torch.dtype) -> int:
        """Of query keys, memory keys, memory values and one result."""
        return self.B * (self.M + self.N) * (self.C + self.V) * dtype.itemsize

    def needed_bytes(self, dtype: torch.dtype, direction: str, holds_affinity: bool) -> int:
        """An upper guess of what a measurement takes: inputs and gradients, copies of them, the check, the affinity."""
        copies = 1 if direction == "forward" else 2
        affinity = 3 * copies * self.B * self.M * self.N * dtype.itemsize * holds_affinity
        return 3 * copies * self.input_bytes(dtype) + (2**32 if self.V >= 128 else 0) + affinity


MOST_IMPORTANT = (Size(1620, 20), Size(1620, 1000), Size(576, 5))
FRAMES, MEMORIES = (576, 1620, 3600, 8160), (1, 5, 20, 100, 1000)


def sizes(tiny: bool, quick: bool) -> list[Size]:
    """All sizes, the most important first; `tiny` proves the program where there is no GPU."""
    if tiny:
        return [Size(40, 2, 1, 16, 32), Size(33, 3, 2, 16, 32)]
    rest = [Size(M, T, B) for B in (1, 2) for M in FRAMES for T in MEMORIES]
    # the cheap before the dear, so that a short budget ends with few gaps
    rest.sort(key=lambda size: (size.B, size.flops("forward")))
    return list(MOST_IMPORTANT) if quick else list(dict.fromkeys([*MOST_IMPORTANT, *rest]))


@dataclass(frozen=True)
class Reads:
    """Where and in what dtype reads are measured."""

    device: torch.device
    """Where."""
    dtype: torch.dtype
    """Of the inputs."""
    tiny: bool
    """Whether all this only proves the program."""
    seed: int = 0
    """Of the inputs."""

    def ceilings(self) -> dict[str, Task]:
        """The rates no read can beat: of a large matrix product by dtype, and of a copy, both on random data."""
        tasks: dict[str, Task] = {
            f"matmul {name_of(kind)}": partial(self._matmul, kind) for kind in dtypes_of(self.device)
        }
        return tasks | {"copy": self._copy}

    def _matmul(self, dtype: torch.dtype) -> Result:
        size = 128 if self.tiny else 8192
        left, right = torch.randn(2, size, size, device=self.device).to(dtype)
        found = self.timed([lambda: left @ right], 0.5)
        return found | {"tflops": 2 * size**3 / found["seconds"] / 1e12}

    def _copy(self) -> Result:
        size = 2**20 if self.tiny else 2**32
        source = torch.randn(size // 4, device=self.device)
        target = torch.empty_like(source)
        found = self.timed([lambda: target.copy_(source)], 0.3)
        return found | {"terabytes_per_second": 2 * size / found["seconds"] / 1e12}

    def timed(self, calls: list[Callable[[], object]], seconds: float = 0.2) -> Result:
        """Median, quartiles, and the medians of either half of the repeats: differences below theirs are noise."""
        # an interpreted kernel is not worth more than two calls
        times = call_seconds(calls, self.device, *((0.0, 2) if self.tiny else (seconds,)))
        half = len(times) // 2
        low, middle, high = statistics.quantiles(times, n=4)
        halves = [statistics.median(times[:half]), statistics.median(times[half:])]
        return {"seconds": middle, "quartiles": [low, high], "halves": halves, "repeats": len(times)}

    def readers(self, quick: bool) -> dict[str, Task]:
        """Every reader at every size and in both directions, by name, and after the important ones our tiles against
        each other; readers that take long to compile come last.
        """
        quickly = [reader for reader in PEERS if reader not in SLOW_TO_COMPILE]
        first, every = sizes(self.tiny, True), sizes(self.tiny, quick)

        def cells(measured: list[Size], readers: Sequence[str]) -> dict[str, Task]:
            return {
                f"{direction}, {size}, {reader}": partial(self.cell, size, direction, reader)
                for size in measured
                for direction in DIRECTIONS
                for reader in readers
            }

        tasks = cells(first, quickly) | self._tile_tasks(first) | cells(first, SLOW_TO_COMPILE)
        return tasks | cells(every, quickly) | cells(every, SLOW_TO_COMPILE)

    def _tile_tasks(self, first: list[Size]) -> dict[str, Task]:
        tasks: dict[str, Task] = {}
        for size in first[::2]:
            for tiles in tiles_of(self.device, self.dtype, size.C, size.V):
                name = "tile " + "-".join(str(value) for value in vars(tiles).values())
                tasks[f"forward, {size}, {name}"] = partial(self.cell, size, "forward", name, forward=tiles)
        for tiles in backward_tiles_of(self.device, self.dtype, first[0].C):
            name = "backward tile " + "-".join(str(value) for value in vars(tiles).values())
            task = partial(self.cell, first[0], DIRECTIONS[1], name, backward=tiles)
            tasks[f"{DIRECTIONS[1]}, {first[0]}, {name}"] = task
        return tasks

    def cell(self, size: Size, direction: str, reader: str, **tiles: Any) -> Result:
        """Check a reader at a size, then measure it; without a check passed there is no time."""
        read, gradients = PEERS.get(reader, PEERS[OURS]), direction != "forward"
        where = {"M": size.M, "T": size.T, "B": size.B, "direction": direction, "reader": reader}
        where["dtype"] = name_of(self.dtype)
        if not self.tiny:
            # what is held of another size is let go first
            held("size", (size, self, False), lambda: None)
            needed = size.needed_bytes(self.dtype, direction, read is naive)
            free = torch.cuda.get_device_properties(self.device).total_memory - torch.cuda.memory_allocated(self.device)
            if needed > 0.95 * free:
                return where | {"skipped": f"would take about {needed / 2**30:.0f} GiB of {free / 2**30:.0f}"}
        problem = self.problem(size)
        with chosen(**tiles):
            ratios = self._errors(problem, read, size, gradients)
            if reason := wrong(ratios):
                return where | {"failed": reason}
            found = self.measured([call_of(copy, read, gradients) for copy in self._rotated(problem, size)], ratios)
        return where | found | {"tflops": size.flops(direction) / found["seconds"] / 1e12}

    def measured(self, calls: list[Callable[[], object]], ratios: dict[str, float]) -> Result:
        extra = extra_memory(calls[0], self.device)
        return {"error_over_allowed": max(ratios.values()), "extra_bytes": extra} | self.timed(calls)

    def problem(self, size: Size, peaked: bool = False) -> Problem:
        kind = {"dtype": self.dtype, "device": self.device, "tracked": peaked, "seed": self.seed}
        problem = held(
            "problem", (size, self, peaked), lambda: draw_problem(size.B, size.M, size.N, size.C, size.V, **kind)
        )
        # not all readers return a log-sum-exp: none gets a gradient through it
        return replace(problem, grad_lse=torch.zeros_like(problem.grad_lse))

    def _errors(self, problem: Problem, read: Callable, size: Size, gradients: bool) -> dict[str, float]:
        """The read at its full size, by some queries; gradients at a memory small enough to be known whole."""
        of = (size, self, False)
        ratios = held("sample", of, lambda: sample_of(problem)).ratios(results_of(problem, read, False))
        if gradients:
            judged = few_positions(problem) if size.B * size.M * size.N > KNOWN_LOGITS else problem
            truth = held("truth", of, lambda: results(judged.to(torch.float64)))
            plain = held("plain", of, lambda: results(judged))
            ratios |= allowed_error_shares(truth, plain, results_of(judged, read, True))
        return ratios

    def _rotated(self, problem: Problem, size: Size) -> list[Any]:
        """The problem, and as many copies of it as no cache holds at once."""
        cache = 0 if self.tiny else torch.cuda.get_device_properties(self.device).L2_cache_size
        count = min(MAX_INPUT_SETS, max(1, -(-2 * cache // size.input_bytes(self.dtype))))
        names = ("query_key", "memory_key", "memory_value", "grad_out")
        copies = ({name: getattr(problem, name).clone() for name in names} for _ in range(count - 1))
        return [problem, *(replace(problem, **copy) for copy in copies)]

    def choices(self, quick: bool) -> dict[str, Task]:
        """What leaving out and choosing save, on peaked and flat affinities, beside the exact read of them."""
        measured = sizes(True, True)[:1] if self.tiny else [Size(1620, 20), Size(1620, 100)][: 1 if quick else 2]
        tasks: dict[str, Task] = {}
        for size in measured:
            for peaked in (True, False):
                for name in CHOICES:
                    for direction in DIRECTIONS:
                        task = partial(self._chosen, size, direction, name, peaked)
                        tasks[f"{direction}, {size}, {'peaked' if peaked else 'flat'}, {name}"] = task
            tasks[f"usage, {size}"] = partial(self._usage, size, False)
            tasks[f"usage after a read, {size}"] = partial(self._usage, size, True)
            tasks[f"paged read, {size}"] = partial(self._paged, size)
        return tasks

    def _chosen(self, size: Size, direction: str, name: str, peaked: bool) -> Result:
        option, problem = CHOICES[name], self.problem(size, peaked)
        top_k, skip = option.get("top_k"), option.get("skip", 0.0)
        read = read_by("triton", **option)
        found: Result = {
            "M": size.M,
            "T": size.T,
            "B": size.B,
            "direction": direction,
            "reader": name,
            "peaked": peaked,
        }
        found["dtype"] = name_of(self.dtype)
        if skip:
            *_, blocks = read_operator(*inputs_of(problem), None, None, problem.scale, 0, skip, "triton")
            found["share_of_blocks_left_out"] = 1 - blocks.float().mean().item()
        of = (size, self, peaked)
        sample = held(f"sample of {top_k}", of, lambda: sample_of(replace(problem, top_k=top_k)))
        with torch.no_grad():
            out, lse = read(*inputs_of(problem), scale=problem.scale)
        slack = 2 * skip * problem.memory_value.abs().max().item()
        ratios = sample.ratios({"out": out}, slack) | sample.ratios({"lse": lse})
        if direction != "forward":
            judged = replace(few_positions(problem), top_k=top_k)
            ratios |= skip_ratios(judged, skip) if skip else error_ratios(judged, read_by("triton"))
        if reason := wrong(ratios):
            return found | {"failed": reason}
        return found | self.measured([call_of(problem, read, direction != "forward")], ratios)

    def _usage(self, size: Size, after: bool) -> Result:
        """Checked by what it must add up to: the number of queries; against float64 it is checked at smaller sizes."""
        problem = self.problem(size)
        keys, kind = inputs_of(problem)[:2], {"scale": problem.scale, "implementation": "triton"}
        lse = memory_read(*inputs_of(problem), **kind, return_lse=True)[1] if after else None

        def call() -> Tensor:
            return memory_usage(*keys, lse=lse, **kind)

        total = call().double().sum(1)
        # as many roundings as there are terms in a logit, a column and a row, all of them in float32
        rounding = torch.finfo(torch.float32).eps * (size.C + size.M + size.N)
        if not ((total / size.M - 1).abs() <= rounding).all():
            return {"failed": f"the usage adds up to {total.tolist()}, not to {size.M}"}
        return {"M": size.M, "T": size.T, "B": size.B} | self.timed([call])

    def _paged(self, size: Size) -> Result:
        problem, page = self.problem(size), 32 if self.tiny else 16384
        memory = PagedMemory(size.B, size.C, size.V, page_size=page, dtype=self.dtype, device=self.device)
        memory.append(problem.memory_key, problem.memory_value)

        def call() -> Any:
            return memory.read(problem.query_key, scale=problem.scale, return_lse=True, implementation="triton")

        sample = held("sample", (size, self, False), lambda: sample_of(problem))
        with torch.no_grad():
            ratios = sample.ratios(dict(zip(("out", "lse"), call())))
        found = {"M": size.M, "T": size.T, "B": size.B, "pages": -(-size.N // page)}
        return found | ({"failed": wrong(ratios)} if wrong(ratios) else self.measured([call], ratios))


_held: dict[str, Any] = {}
_held_of: list[tuple] = []


def held(what: str, of: tuple, make: Callable[[], Any]) -> Any:
    """What was made of this size before, else made anew; what was held of another is let go, both would not fit."""
    if _held_of != [of]:
        _held.clear()
        _held_of[:] = [of]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if what not in _held:
        _held[what] = make()
    return _held[what]


def inputs_of(problem: Problem, gradients: bool = False) -> list[Tensor]:
    tensors = (problem.query_key, problem.memory_key, problem.memory_value)
    return [tensor.detach().requires_grad_(gradients) for tensor in tensors]


def few_positions(problem: Problem) -> Any:
    """The problem of a part of its memory."""
    names = ("memory_key", "memory_value")
    return replace(problem, **{name: getattr(problem, name)[:, :JUDGED_POSITIONS] for name in names})


def results_of(problem: Problem, read: Callable, gradients: bool) -> dict[str, Tensor]:
    """The read and, if asked, its gradients; readers need not return more than the read."""
    inputs = inputs_of(problem, gradients)
    out = read(*inputs, scale=problem.scale)[0]
    grads = torch.autograd.grad(out, inputs, problem.grad_out) if gradients else ()
    names = ("grad_query_key", "grad_memory_key", "grad_memory_value")
    return {"out": out.detach()} | dict(zip(names, grads))


def call_of(problem: Problem, read: Callable, gradients: bool) -> Callable[[], object]:
    inputs = inputs_of(problem, gradients)

    def forward() -> object:
        with torch.no_grad():
            return read(*inputs, scale=problem.scale)

    def both() -> object:
        return torch.autograd.grad(read(*inputs, scale=problem.scale)[0], inputs, problem.grad_out)

    return both if gradients else forward
