"""What bench/gpu.py asks of the kernels before it times them: every variant against float64, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.gpu_readers import backward_tiles_of, chosen, tiles_of
from bench.harness import Result
from bench.read import Size, draw_problem, errors, inputs_of
from stm_kernels import PagedMemory, memory_usage
from stm_kernels.reference import reference_usage
from stm_kernels.testing import (
    Problem,
    allowed_error_shares,
    error_ratios,
    make_problem,
    make_tie_problem,
    read_by,
    results,
)

Ratios = dict[str, float]


def judged(ratios: Ratios) -> Result:
    """The largest error, or what a read errs in."""
    wrong = {name: round(ratio, 2) for name, ratio in ratios.items() if not ratio <= 1}
    return {"failed": f"error over allowed error: {wrong}"} if wrong else {"error_over_allowed": max(ratios.values())}


def first_checks(device: str, dtype: torch.dtype, tiny: bool) -> dict[str, Callable[[], Ratios]]:
    """What every user meets, at two sizes: each kernel with its default tile, both ways.

    `tiny` where a kernel is interpreted or sanitized.
    """
    # a scale that is no power of two: one would spare plain PyTorch a rounding
    sizes = [(2, 66, 150, 24, 48), (1, 33, 70, 16, 32)] if tiny else [(2, 1620, 3300, 128, 512), (1, 131, 517, 64, 128)]
    kind: dict[str, Any] = {"dtype": dtype, "device": device}
    checks: dict[str, Callable[[], Ratios]] = {}

    def draw(*size: int, **more: Any) -> Problem:
        return replace(make_problem(*size, **kind, **more), scale=0.9 * size[3] ** -0.5)

    for size in sizes:
        make, title = partial(draw, *size), "B={} M={} N={} C={} V={}".format(*size)
        checks |= {
            f"read and backward, {title}": lambda make=make: error_ratios(make(), read_by("triton")),
            f"squared distance, {title}": lambda make=make: error_ratios(make(similarity="l2"), read_by("triton")),
            f"top-k, {title}": lambda make=make: error_ratios(replace(make(), top_k=30), read_by("triton")),
            f"skip, {title}": lambda make=make: errors(make(peak=4.0), read_by("triton", skip=0.1), 0.1),
            f"usage, {title}": lambda make=make: check_usage(make(), None),
        }
    return checks


def checks_of(device: str, dtype: torch.dtype, tiny: bool) -> dict[str, Callable[[], Ratios]]:
    """Every check by name, those of the first minute first."""
    large = (2, 66, 150, 24, 48) if tiny else (2, 1620, 3300, 128, 512)
    odd = (1, 33, 70, 20, 33) if tiny else (3, 131, 517, 100, 300)
    objects = (1, 33, 70, 16, 6 * 64) if tiny else (1, 700, 2100, 128, 3 * 512)
    ties = (1, 40, 90, 64, 40)
    # channels of whole 16 bytes: tiles that need descriptors get them
    whole = (*odd[:3], odd[3] // 8 * 8, odd[4] // 8 * 8)
    kind: dict[str, Any] = {"dtype": dtype, "device": device}
    make: Callable[..., Problem] = partial(make_problem, **kind)

    def judge(make: Callable[[], Problem], top_k: int | None = None, **tiles: Any) -> Ratios:
        with chosen(**tiles):
            return error_ratios(replace(make(), top_k=top_k), read_by("triton"))

    checks = first_checks(device, dtype, tiny) | {
        "peaked": partial(judge, partial(make, *large, peak=5.0)),
        "channel-major": partial(judge, partial(make, *large, channel_major=True)),
        "odd sizes": partial(judge, partial(make, *odd)),
        "logits of 10^4": partial(judge, partial(make_tie_problem, *ties, **kind)),
        "bias, lengths, hidden positions": partial(judge, partial(make, *odd, biased=True, ragged=True)),
        "squared distance, odd sizes": partial(judge, partial(make, *odd, similarity="l2")),
        "values of many objects": partial(judge, partial(make, *objects)),
        "top-k, odd sizes": partial(judge, partial(make, *odd), top_k=7),
        "top-k among equals": partial(judge, partial(make_tie_problem, *ties, **kind), top_k=7),
        "usage of the best": lambda: check_usage(make(*odd), 7),
        "paged": lambda: check_pages(make(*odd)),
        "3 splits": partial(judge, partial(make, *odd), positions_per_split=-(-odd[2] // 3)),
    }
    for index, tiles in enumerate(tiles_of(device, dtype, *whole[3:])[1:], 1):
        checks[f"tile {index}"] = partial(judge, partial(make, *whole), forward=tiles)
    for index, tiles in enumerate(backward_tiles_of(device, dtype, odd[3])[1:], 1):
        checks[f"backward tile {index}"] = partial(judge, partial(make, *odd), backward=tiles)
    if not tiny and dtype == torch.float16:
        checks["B·N·V beyond 2^31, gradients"] = lambda: check_long_gradients(device)
    return checks


def check_usage(problem: Problem, top_k: int | None) -> Ratios:
    wide, scale = problem.to(torch.float64), problem.scale
    truth, plain = (reference_usage(one.query_key, one.memory_key, scale, top_k=top_k) for one in (wide, problem))
    found = memory_usage(*inputs_of(problem)[:2], scale=scale, top_k=top_k, implementation="triton")
    return allowed_error_shares({"usage": truth}, {"usage": plain}, {"usage": found})


def pages_of(problem: Problem, page: int, frame: int) -> Callable[..., Any]:
    """The read of a memory of pages to which the problem's was appended, `frame` positions at a time."""
    (B, _, C), V = problem.memory_key.shape, problem.memory_value.shape[2]
    kind: dict[str, Any] = {"dtype": problem.memory_key.dtype, "device": problem.memory_key.device}
    memory = PagedMemory(B, C, V, page_size=page, **kind)
    for key, value in zip(problem.memory_key.split(frame, 1), problem.memory_value.split(frame, 1)):
        memory.append(key, value)
    return lambda query_key, *_, scale: memory.read(query_key, scale=scale, return_lse=True, implementation="triton")


def check_pages(problem: Problem) -> Ratios:
    N = problem.memory_key.shape[1]
    return error_ratios(problem, pages_of(problem, N // 3 + 1, N // 4 + 1), gradients=False)


def check_long_gradients(device: str) -> Ratios:
    """Of a memory hidden but for its ends, the last of which lies beyond 32 bits: a small problem in a large one."""
    size = Size(64, 1 + 2**31 // (512 * 64) + 64)
    problem = draw_problem(size, torch.float16, device)
    seen = torch.zeros(size.N, dtype=torch.bool, device=device)
    seen[:100] = seen[-4000:] = True
    bias = torch.zeros(1, size.N, device=device).masked_fill(~seen, -torch.inf)
    ends = {name: getattr(problem, name)[:, seen] for name in ("memory_key", "memory_value")}
    small = replace(problem, **ends, key_bias=bias[:, seen])
    found = results(replace(problem, key_bias=bias), read_by("triton"))
    leak = any(found[f"grad_{name}"][:, ~seen].any().item() for name in ends)
    for name in ("grad_memory_key", "grad_memory_value", "grad_key_bias"):
        found[name] = found[name][:, seen]
    ratios = allowed_error_shares(results(small.to(torch.float64)), results(small), found)
    return ratios | {"hidden positions": float("inf") if leak else 0.0}
