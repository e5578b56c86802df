"""Ceilings and times: a large product, a copy, every reader at every size, and what skipping and choosing save."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.checks import skip_ratios
from bench.machine import cache_bytes
from bench.peers import NAIVE, OURS, PEERS, SLOW_TO_COMPILE
from bench.shapes import DIRECTIONS, MOST_IMPORTANT, Size, sizes
from bench.tiles import affinity_candidates, forward_candidates, read_with, wrong
from bench.timing import call_seconds
from bench.workers import Result, Task
from stm_kernels import PagedMemory, memory_read, memory_usage
from stm_kernels.operator import read_operator
from stm_kernels.testing import (
    Problem,
    Sample,
    allowed_error_shares,
    draw_problem,
    error_ratios,
    extra_memory,
    read_by,
    results,
    sample_of,
)

# logits that float64 and six copies of them fit beside everything else
KNOWN_LOGITS = 2**28
JUDGED_POSITIONS = 4096
MOST_INPUT_SETS = 200


def spread(seconds: list[float]) -> Result:
    """Median, quartiles, and the medians of either half of the repeats: differences below theirs are noise."""
    half = len(seconds) // 2
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "seconds": statistics.median(seconds),
        "quartiles": [low, high],
        "halves": [statistics.median(seconds[:half] or seconds), statistics.median(seconds[half:])],
        "repeats": len(seconds),
    }


def _timed(calls: list[Callable[[], object]], device: torch.device) -> Result:
    """An interpreted kernel is not worth more than two calls."""
    return spread(call_seconds(calls, device) if device.type == "cuda" else call_seconds(calls, device, 0.0, 2))


def ceiling_tasks(device: torch.device, tiny: bool) -> dict[str, Task]:
    """The rates no read can beat: of a large matrix product by dtype, and of a copy, both on random data."""
    dtypes = [torch.float16, torch.float32] if tiny else [torch.bfloat16, torch.float16, torch.float32]
    tasks = {
        f"matmul {_word(dtype)}": partial(_matmul_ceiling, device, dtype, 128 if tiny else 8192) for dtype in dtypes
    }
    return tasks | {"copy": partial(_copy_ceiling, device, 2**20 if tiny else 2**32)}


def _matmul_ceiling(device: torch.device, dtype: torch.dtype, size: int) -> Result:
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    found = spread(call_seconds([lambda: left @ right], device, seconds=0.5))
    return found | {"size": size, "tflops": 2 * size**3 / found["seconds"] / 1e12}


def _copy_ceiling(device: torch.device, size: int) -> Result:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    found = spread(call_seconds([lambda: target.copy_(source)], device, seconds=0.3))
    return found | {"bytes": size, "terabytes_per_second": 2 * size / found["seconds"] / 1e12}


def read_tasks(device: torch.device, dtype: torch.dtype, tiny: bool, quick: bool, seed: int) -> dict[str, Task]:
    """Every reader at every size and in both directions, by name, and after the important ones our tiles against each
    other; readers that take long to compile come last.
    """
    every, first = sizes(tiny, quick), sizes(tiny, True)
    quickly = [reader for reader in PEERS if reader not in SLOW_TO_COMPILE]
    tasks = _cells(first, quickly, dtype, device, seed) | _tile_tasks(device, dtype, tiny, seed)
    tasks |= _cells(first, SLOW_TO_COMPILE, dtype, device, seed)
    return tasks | _cells(every, quickly, dtype, device, seed) | _cells(every, SLOW_TO_COMPILE, dtype, device, seed)


def _cells(
    measured: list[Size], readers: Sequence[str], dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Task]:
    tasks = {}
    for size in measured:
        for direction in DIRECTIONS:
            for reader in readers:
                read = PEERS[reader]
                tasks[f"{direction}, {size}, {reader}"] = partial(
                    _cell, size, direction, reader, read, dtype, device, seed
                )
    return tasks


def _tile_tasks(device: torch.device, dtype: torch.dtype, tiny: bool, seed: int) -> dict[str, Task]:
    from stm_kernels.gpu.launch import architecture_of

    architecture, tasks = architecture_of(device), {}
    for size in sizes(tiny, True)[:1] if tiny else [MOST_IMPORTANT[0], MOST_IMPORTANT[2]]:
        for tiles in forward_candidates(architecture, dtype, size.C, size.V, False, True):
            task = partial(_cell, size, "forward", _tile_name(tiles), read_with(tiles), dtype, device, seed)
            tasks[f"forward, {size}, {_tile_name(tiles)}"] = task
    size = sizes(tiny, True)[0]
    for tiles in affinity_candidates(architecture, dtype, size.C):
        name = "backward " + _tile_name(tiles)
        task = partial(_cell, size, DIRECTIONS[1], name, read_with(backward=tiles), dtype, device, seed)
        tasks[f"{DIRECTIONS[1]}, {size}, {name}"] = task
    for other in (torch.float16, torch.float32):
        if other != dtype:
            for direction in DIRECTIONS:
                task = partial(_cell, size, direction, OURS, PEERS[OURS], other, device, seed)
                tasks[f"{direction}, {size}, {OURS}, {_word(other)}"] = task
    return tasks


def _tile_name(tiles: Any) -> str:
    return "tile " + "x".join(str(value) for value in vars(tiles).values())


_held: dict[str, Any] = {}
_held_of: list[tuple] = []


def _hold(what: str, of: tuple, make: Callable[[], Any]) -> Any:
    """What was made of this size before, else made anew; what was held of another is let go, both would not fit."""
    if _held_of != [of]:
        _held.clear()
        _held_of[:] = [of]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if what not in _held:
        _held[what] = make()
    return _held[what]


def _problem(size: Size, dtype: torch.dtype, device: torch.device, seed: int, tracked: bool = False) -> Problem:
    def make() -> Problem:
        problem = draw_problem(
            size.B, size.M, size.N, size.C, size.V, dtype=dtype, device=device, tracked=tracked, seed=seed
        )
        # not all readers return a log-sum-exp: none gets a gradient through it
        return replace(problem, grad_lse=torch.zeros_like(problem.grad_lse))

    return _hold("problem", (size, dtype, tracked), make)


def _inputs(problem: Problem, gradients: bool = False) -> list[Tensor]:
    tensors = (problem.query_key, problem.memory_key, problem.memory_value)
    return [tensor.detach().requires_grad_(gradients) for tensor in tensors]


def _results(problem: Problem, read: Callable, gradients: bool) -> dict[str, Tensor]:
    """The read and, if asked, its gradients; readers need not return more than the read."""
    inputs = _inputs(problem, gradients)
    out = read(*inputs, scale=problem.scale)[0]
    found = {"out": out.detach()}
    if gradients:
        names = ("grad_query_key", "grad_memory_key", "grad_memory_value")
        found |= zip(names, torch.autograd.grad(out, inputs, problem.grad_out))
    return found


def _errors(problem: Problem, read: Callable, size: Size, gradients: bool) -> dict[str, float]:
    """The read at its full size, by some queries; gradients at a memory small enough to be known whole."""
    dtype = problem.query_key.dtype
    sample: Sample = _hold("sample", (size, dtype, False), lambda: sample_of(problem))
    ratios = sample.ratios(_results(problem, read, False))
    if gradients:
        judged = problem
        if size.B * size.M * size.N > KNOWN_LOGITS:
            few = slice(0, JUDGED_POSITIONS)
            judged = replace(
                problem, memory_key=problem.memory_key[:, few], memory_value=problem.memory_value[:, few]
            )  # fmt: skip
        truth = _hold("truth", (size, dtype, False), lambda: results(judged.to(torch.float64)))
        plain = _hold("plain", (size, dtype, False), lambda: results(judged))
        ratios |= allowed_error_shares(truth, plain, _results(judged, read, True))
    return ratios


def _cell(
    size: Size, direction: str, reader: str, read: Callable, dtype: torch.dtype, device: torch.device, seed: int
) -> Result:
    """Check a reader at a size, then measure it; without a check passed there is no time."""
    where = {"M": size.M, "T": size.T, "B": size.B, "direction": direction, "reader": reader, "dtype": _word(dtype)}
    gradients = direction != "forward"
    if device.type == "cuda":
        _hold("size", (size, dtype, False), lambda: None)
        needed = size.needed_bytes(dtype, direction, reader == NAIVE)
        free = torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated(device)
        if needed > 0.95 * free:
            return where | {"skipped": f"would take about {needed / 2**30:.0f} GiB of {free / 2**30:.0f}"}
    problem = _problem(size, dtype, device, seed)
    ratios = _errors(problem, read, size, gradients)
    reason = wrong(ratios)
    if reason:
        return where | {"failed": reason}
    calls = [_call(copy, read, gradients) for copy in _rotated(problem, size, dtype, device)]
    found = {"error_over_allowed": max(ratios.values()), "extra_bytes": extra_memory(calls[0], device)}
    found |= _timed(calls, device)
    return where | found | {"tflops": size.flops(direction) / found["seconds"] / 1e12}


def _call(problem: Problem, read: Callable, gradients: bool) -> Callable[[], object]:
    inputs = _inputs(problem, gradients)

    def forward() -> object:
        with torch.no_grad():
            return read(*inputs, scale=problem.scale)

    def both() -> object:
        return torch.autograd.grad(read(*inputs, scale=problem.scale)[0], inputs, problem.grad_out)

    return both if gradients else forward


def _rotated(problem: Problem, size: Size, dtype: torch.dtype, device: torch.device) -> list[Problem]:
    """The problem, and as many copies of it as no cache holds at once."""
    count = min(MOST_INPUT_SETS, max(1, -(-2 * cache_bytes(device) // size.input_bytes(dtype))))
    tensors = ("query_key", "memory_key", "memory_value", "grad_out")
    copies = [replace(problem, **{name: getattr(problem, name).clone() for name in tensors}) for _ in range(count - 1)]
    return [problem, *copies]


def choice_tasks(device: torch.device, dtype: torch.dtype, tiny: bool, quick: bool, seed: int) -> dict[str, Task]:
    """What is saved by leaving out and by choosing, on a peaked affinity, beside the exact read of the same inputs."""
    measured = sizes(True, True)[:1] if tiny else [Size(1620, 20), Size(1620, 100)][: 1 if quick else 2]
    options: dict[str, dict[str, Any]] = {
        "exact": {},
        "skip=1e-3": {"skip": 1e-3},
        "skip=1e-2": {"skip": 1e-2},
        "top_k=30": {"top_k": 30},
        "top_k=50": {"top_k": 50},
    }
    tasks = {}
    for size in measured:
        for tracked in (True, False):
            kind = "peaked" if tracked else "flat"
            for name, option in options.items():
                for direction in DIRECTIONS:
                    task = partial(_chosen, size, direction, name, option, tracked, dtype, device, seed)
                    tasks[f"{direction}, {size}, {kind}, {name}"] = task
        tasks[f"usage, {size}"] = partial(_usage, size, dtype, device, seed, False)
        tasks[f"usage after a read, {size}"] = partial(_usage, size, dtype, device, seed, True)
        tasks[f"paged read, {size}"] = partial(_paged, size, dtype, device, seed)
    return tasks


def _chosen(
    size: Size,
    direction: str,
    name: str,
    option: dict[str, Any],
    tracked: bool,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Result:
    problem = _problem(size, dtype, device, seed, tracked)
    top_k, skip = option.get("top_k"), option.get("skip", 0.0)
    kept = {}

    def read(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> tuple[Tensor, ...]:
        return memory_read(
            query_key, memory_key, memory_value, scale=scale, **option, return_lse=True, implementation="triton"
        )

    if skip:
        *_, blocks = read_operator(*_inputs(problem), None, None, problem.scale, 0, skip, "triton")
        kept = {"share_of_blocks_left_out": 1 - blocks.float().mean().item()}
    sample = _hold(f"sample of {top_k}", (size, dtype, tracked), lambda: sample_of(replace(problem, top_k=top_k)))
    with torch.no_grad():
        out, lse = read(*_inputs(problem), scale=problem.scale)
    slack = 2 * skip * problem.memory_value.abs().max().item()
    ratios = sample.ratios({"out": out}, slack) | {"lse": sample.ratios({"lse": lse})["lse"]}
    if direction != "forward":
        few = slice(0, JUDGED_POSITIONS)
        judged = replace(
            problem, memory_key=problem.memory_key[:, few], memory_value=problem.memory_value[:, few], top_k=top_k
        )
        ratios |= skip_ratios(judged, skip) if skip else error_ratios(judged, read_by("triton"))
    where = {"M": size.M, "T": size.T, "B": size.B, "direction": direction, "reader": name, "peaked": tracked}
    where["dtype"] = _word(dtype)
    if reason := wrong(ratios):
        return where | {"failed": reason}
    call = _call(problem, read, direction != "forward")
    found = kept | {"error_over_allowed": max(ratios.values()), "extra_bytes": extra_memory(call, device)}
    return where | found | _timed([call], device)


def _usage(size: Size, dtype: torch.dtype, device: torch.device, seed: int, after: bool) -> Result:
    """Checked by what it must add up to: the number of queries; against float64 it is checked at smaller sizes."""
    problem = _problem(size, dtype, device, seed)
    keys = (problem.query_key, problem.memory_key)
    lse = memory_read(*_inputs(problem), scale=problem.scale, return_lse=True, implementation="triton")[1]

    def call() -> Tensor:
        return memory_usage(*keys, scale=problem.scale, lse=lse if after else None, implementation="triton")

    total = call().double().sum(1)
    # as many roundings as there are terms in a logit, a column and a row, all of them in float32
    rounding = torch.finfo(torch.float32).eps * (size.C + size.M + size.N)
    if not ((total / size.M - 1).abs() <= rounding).all():
        return {"failed": f"the usage adds up to {total.tolist()}, not to {size.M}"}
    found = _timed([call], device)
    return {"M": size.M, "T": size.T, "B": size.B, "dtype": _word(dtype)} | found


def _paged(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Result:
    problem = _problem(size, dtype, device, seed)
    page = 32 if device.type == "cpu" else 16384
    memory = PagedMemory(size.B, size.C, size.V, page_size=page, dtype=dtype, device=device)
    memory.append(problem.memory_key, problem.memory_value)

    def call() -> Any:
        return memory.read(problem.query_key, scale=problem.scale, return_lse=True, implementation="triton")

    sample = _hold("sample", (size, dtype, False), lambda: sample_of(problem))
    with torch.no_grad():
        ratios = sample.ratios(dict(zip(("out", "lse"), call())))
    where = {"M": size.M, "T": size.T, "B": size.B, "dtype": _word(dtype), "pages": -(-size.N // page)}
    if reason := wrong(ratios):
        return where | {"failed": reason}
    found = _timed([call], device)
    return where | {"error_over_allowed": max(ratios.values())} | found


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
