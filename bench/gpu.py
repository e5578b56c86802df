"""All that a GPU can tell about the read, in one command: python bench/gpu.py [--minutes 9] [--quick]

First whether every variant is right on the device, then the ceilings of matrix products and copies, then time and
memory of every reader at every size, forward and backward, the most important sizes first. What is wrong gets no time.
The JSON is rewritten as results come, so a run that is stopped leaves what it had. Needs PyTorch, Triton, NumPy and
einops alone; `python -m pytest tests/kernels` runs every test of the kernels on the GPU beside it.

    python bench/gpu.py --device cpu --out dry.json                   # proves the program itself: tiny, interpreted
    compute-sanitizer --tool memcheck python bench/gpu.py --sanitize  # every kernel, small ragged shapes, no times
    python bench/gpu.py --only "M=1620 T=20 B=1" --out one.json       # only what has these words in its name
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# a machine with a GPU may run a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.gpu_readers import READERS, backward_tiles_of, chosen, tiles_of, timed
from bench.harness import MIB, Result, Task, clocks, describe, run_tasks, table, write_json
from bench.read import CHOICES, WAYS, Size, both_ways, draw_problem, errors, inputs_of
from stm_kernels import PagedMemory, memory_read, memory_usage
from stm_kernels.reference import reference_usage
from stm_kernels.testing import (
    Problem,
    allowed_error_shares,
    error_ratios,
    extra_memory,
    make_problem,
    make_tie_problem,
    read_by,
    results,
)

CHECK_SHARE = 0.4
"""Of the time, for finding out what is right."""
JUDGED_POSITIONS = 4096
"""Of the memory with which gradients are judged."""
MOST_IMPORTANT = (Size(1620, 20), Size(1620, 1000), Size(576, 5))
FRAMES, MEMORIES = (576, 1620, 3600, 8160), (1, 5, 20, 100, 1000)

Ratios = dict[str, float]
Sections = dict[str, dict[str, Task]]


def sizes(device: str, quick: bool) -> list[Size]:
    """All sizes, the most important first, then the cheap before the dear; tiny ones prove the program on a CPU."""
    if device == "cpu":
        return [Size(40, 2, 1, 16, 32), Size(33, 3, 2, 16, 32)]
    rest = [Size(M, T, B) for B in (1, 2) for M in FRAMES for T in MEMORIES]
    rest.sort(key=lambda size: (size.B, size.flops()))
    return list(MOST_IMPORTANT) if quick else list(dict.fromkeys([*MOST_IMPORTANT, *rest]))


def dtypes_of(device: str) -> list[torch.dtype]:
    """The one that matters most first; the interpreter has no bfloat16."""
    return [torch.bfloat16] * (device == "cuda") + [torch.float16, torch.float32]


def build_tasks(arguments: argparse.Namespace) -> Sections:
    """All that is to be done, by section and name, in order."""
    device, quick, tiny = arguments.device, arguments.quick, arguments.device == "cpu" or arguments.sanitize
    sections: Sections = {"checks": {}}
    for dtype in dtypes_of(device):
        for name in checks_of(device, dtype, tiny):
            sections["checks"][f"{dtype}: {name}"] = partial(check, device, dtype, tiny, name)
    if not arguments.sanitize:
        important, every = sizes(device, True), sizes(device, quick)
        sections["ceilings"] = {f"matmul {dtype}": partial(matmul, device, dtype) for dtype in dtypes_of(device)}
        sections["ceilings"]["copy"] = partial(copy, device)
        sections["reads"] = cells(device, important) | tile_cells(device, important)
        sections["choices"] = choices(device, quick)
        first = sections["reads"]
        sections["more reads"] = {name: task for name, task in cells(device, every).items() if name not in first}
    return {
        section: {name: task for name, task in tasks.items() if arguments.only in name or section == "ceilings"}
        for section, tasks in sections.items()
    }


def check(device: str, dtype: torch.dtype, tiny: bool, name: str) -> Result:
    return judged(checks_of(device, dtype, tiny)[name]())


def judged(ratios: Ratios) -> Result:
    """The largest error, or what a read errs in."""
    wrong = {name: round(ratio, 2) for name, ratio in ratios.items() if not ratio <= 1}
    return {"failed": f"error over allowed error: {wrong}"} if wrong else {"error_over_allowed": max(ratios.values())}


def checks_of(device: str, dtype: torch.dtype, tiny: bool) -> dict[str, Callable[[], Ratios]]:
    """Every check by name; `tiny` where a kernel is interpreted or sanitized."""
    # a scale that is no power of two: one would spare plain PyTorch a rounding
    large = (2, 66, 150, 24, 48) if tiny else (2, 1620, 3300, 128, 512)
    odd = (1, 33, 70, 20, 33) if tiny else (3, 131, 517, 100, 300)
    ties = (1, 40, 90, 64, 40)
    # channels of whole 16 bytes: tiles that need descriptors get them
    whole = (*odd[:3], odd[3] // 8 * 8, odd[4] // 8 * 8)
    kind: dict[str, Any] = {"dtype": dtype, "device": device}
    make: Callable[..., Problem] = partial(make_problem, **kind)
    problems: dict[str, Callable[[], Problem]] = {
        "read and backward": partial(make, *large),
        "peaked": partial(make, *large, peak=5.0),
        "channel-major": partial(make, *large, channel_major=True),
        "odd sizes": partial(make, *odd),
        "logits of 10^4": partial(make_tie_problem, *ties, **kind),
        "bias, lengths, hidden positions": partial(make, *odd, biased=True, ragged=True),
        "squared distance": partial(make, *odd, similarity="l2"),
        "values of many objects": partial(make, *((1, 33, 70, 16, 6 * 64) if tiny else (1, 700, 2100, 128, 3 * 512))),
        "top-k": lambda: replace(make(*odd), top_k=7),
        "top-k among equals": lambda: replace(make_tie_problem(*ties, **kind), top_k=7),
    }

    def judge(make: Callable[[], Problem], **tiles: Any) -> Ratios:
        with chosen(**tiles) if tiles else nullcontext():
            return error_ratios(make(), read_by("triton"))

    checks: dict[str, Callable[[], Ratios]] = {name: partial(judge, make) for name, make in problems.items()}
    checks |= {
        "skip": lambda: errors(make(*large, peak=4.0), read_by("triton", skip=0.1), 0.1),
        "usage": lambda: check_usage(make(*large), None),
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


def matmul(device: str, dtype: torch.dtype) -> Result:
    """The rate of products that no read can beat, on random data."""
    size = 128 if device == "cpu" else 8192
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    found = timed(lambda: left @ right, device)
    return found | {"dtype": str(dtype), "tflops": 2 * size**3 / found["seconds"] / 1e12}


def copy(device: str) -> Result:
    """The rate of memory that no read can beat."""
    source = torch.randn(2**18 if device == "cpu" else 2**30, device=device)
    target = torch.empty_like(source)
    found = timed(lambda: target.copy_(source), device)
    return found | {"terabytes_per_second": 2 * source.nbytes / found["seconds"] / 1e12}


def cells(device: str, measured: list[Size]) -> dict[str, Task]:
    """Every reader at these sizes, both ways; a dry run leaves out what runs on a GPU alone."""
    readers = ("ours", "naive") if device == "cpu" else READERS
    return {
        f"{way}, {size}, {reader}": partial(cell, size, way, reader, device)
        for size in measured
        for way in WAYS
        for reader in readers
    }


def tile_cells(device: str, important: list[Size]) -> dict[str, Task]:
    """Our tiles against each other."""
    tasks: dict[str, Task] = {}
    dtype = dtypes_of(device)[0]
    for size in important[::2]:
        for tiles in tiles_of(device, dtype, size.C, size.V):
            name = "tile " + "-".join(map(str, vars(tiles).values()))
            tasks[f"forward, {size}, {name}"] = partial(cell, size, "forward", name, device, forward=tiles)
    size, way = important[0], "forward + backward"
    for tiles in backward_tiles_of(device, dtype, size.C):
        name = "backward tile " + "-".join(map(str, vars(tiles).values()))
        tasks[f"{way}, {size}, {name}"] = partial(cell, size, way, name, device, backward=tiles)
    return tasks


_problems: dict[tuple, Problem] = {}


def problem_of(size: Size, device: str, tracked: bool = False) -> Problem:
    """The problem of a size, kept for the tasks that follow; another one is let go first: both might not fit."""
    if (size, tracked) not in _problems:
        _problems.clear()
        if device == "cuda":
            torch.cuda.empty_cache()
        _problems[size, tracked] = draw_problem(size, dtypes_of(device)[0], device, tracked)
    return _problems[size, tracked]


def gradient_errors(problem: Problem, read: Callable[..., Tensor]) -> Ratios:
    """Of a part of the memory, small enough to be known whole; no gradient comes through a log-sum-exp."""
    part = {name: getattr(problem, name)[:, :JUDGED_POSITIONS] for name in ("memory_key", "memory_value")}
    few = replace(problem, **part, grad_lse=torch.zeros_like(problem.grad_lse))
    names = ("grad_query_key", "grad_memory_key", "grad_memory_value")
    found = dict(zip(names, both_ways(few, read)()))
    return allowed_error_shares(results(few.to(torch.float64)), results(few), found)


def cell(size: Size, way: str, reader: str, device: str, **tiles: Any) -> Result:
    """Check a reader at a size, then measure it; without a check passed there is no time."""
    read, problem = READERS["ours" if tiles else reader], problem_of(size, device)
    with chosen(**tiles) if tiles else nullcontext():
        return measured(size, way, reader, problem, read, device)


def measured(
    size: Size, way: str, reader: str, problem: Problem, read: Callable[..., Tensor], device: str, skip: float = 0.0
) -> Result:
    ratios = errors(problem, read, skip)
    if way != "forward" and not skip:
        # which blocks a read skips depends on all of them; their gradients are for the tests
        ratios |= gradient_errors(problem, read)
    found = asdict(size) | {"way": way, "reader": reader, "dtype": str(dtypes_of(device)[0])} | judged(ratios)
    if "failed" in found:
        return found
    call = WAYS[way](problem, read)
    found |= {"extra_bytes": extra_memory(call, device)} | timed(call, device)
    return found | {"tflops": size.flops(way) / found["seconds"] / 1e12}


def choices(device: str, quick: bool) -> dict[str, Task]:
    """What leaving out and choosing save, on peaked and flat affinities, beside the exact read of them."""
    sizes_of_choices = sizes(device, True)[:1] if device == "cpu" else [Size(1620, 20), Size(1620, 100)][: 2 - quick]
    tasks: dict[str, Task] = {f"paged read, {size}": partial(paged, size, device) for size in sizes_of_choices}
    for size, tracked, name, way in itertools.product(sizes_of_choices, (True, False), CHOICES, WAYS):
        title = f"{way}, {size}, {'peaked' if tracked else 'flat'}, {name}"
        tasks[title] = partial(choice, size, way, name, tracked, device)
    return tasks


def choice(size: Size, way: str, name: str, tracked: bool, device: str) -> Result:
    problem = replace(problem_of(size, device, tracked), top_k=CHOICES[name].get("top_k"))
    read = partial(memory_read, **CHOICES[name], implementation="triton")
    return measured(size, way, name, problem, read, device, CHOICES[name].get("skip", 0.0)) | {"tracked": tracked}


def paged(size: Size, device: str) -> Result:
    problem = problem_of(size, device)
    read = pages_of(problem, 32 if device == "cpu" else 16384, size.N)
    found = asdict(size) | judged(errors(problem, read))
    return (
        found if "failed" in found else found | timed(partial(read, *inputs_of(problem), scale=problem.scale), device)
    )


class Report:
    """What is known so far, written as it comes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.path, self.begun = arguments.out, time.time()
        self.content: dict[str, Any] = {"machine": describe(arguments.device), "clocks": {}}
        self.content |= {"dtype": str(dtypes_of(arguments.device)[0])}
        self.content |= {section: {} for section in ("checks", "ceilings", "reads", "choices")}

    def tell(self, section: str, name: str, result: Result) -> None:
        """Note a result and print a line about it."""
        ceiling = self.content["ceilings"].get(f"matmul {result.get('dtype')}", {}).get("tflops")
        if ceiling and section != "ceilings" and "tflops" in result:
            result["share_of_matmul"] = result["tflops"] / ceiling
        self.content[section][name] = result
        units = {"seconds": "{:.6f} s", "tflops": "{:.1f} TFLOP/s", "error_over_allowed": "error {:.2f} of allowed"}
        words = [text.format(result[key]) for key, text in units.items() if key in result]
        words += [f"{result['extra_bytes'] / MIB:.1f} MiB extra"] if "extra_bytes" in result else []
        words += [f"{key}: {result[key]}" for key in ("failed", "skipped") if key in result]
        print(f"{time.time() - self.begun:5.0f} s  {name}: {', '.join(words)}", flush=True)
        self.write()

    def write(self) -> None:
        self.content["wall_seconds"] = time.time() - self.begun
        write_json(self.content, self.path)

    def summary(self) -> str:
        """The last lines of a run: what is wrong, and how ours stands at each size."""
        checks = self.content["checks"]
        wrong = [name for name, result in checks.items() if "failed" in result]
        skipped = sum("skipped" in result for result in checks.values())
        lines = [f"checks: {len(checks) - len(wrong) - skipped} right, {len(wrong)} wrong, {skipped} not run"]
        lines += [f"  wrong: {name}" for name in wrong]
        groups: dict[tuple, Ratios] = defaultdict(dict)
        for found in self.content["reads"].values():
            if "tflops" in found and "tile" not in found["reader"]:
                groups[found["way"], found["M"], found["T"], found["B"]][found["reader"]] = found["tflops"]
        rows = []
        for size, speeds in groups.items():
            mine = speeds.pop("ours", float("nan"))
            best = max(speeds, key=speeds.__getitem__, default="")
            rows.append((*size, mine, best, speeds.get(best, "")))
        return "\n".join([*lines, table(("", "M", "T", "B", "ours, TFLOP/s", "best other", "TFLOP/s"), rows)])


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing new after that")
    parser.add_argument("--quick", action="store_true", help="the three most important sizes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a dry run with tiny sizes")
    parser.add_argument("--out", type=Path, help="JSON file; default: bench/results/<device>/gpu.json")
    parser.add_argument("--workers", type=int, help="processes for the checks; 0 does everything in this one")
    parser.add_argument("--sanitize", action="store_true", help="only run every kernel once, for compute-sanitizer")
    parser.add_argument("--only", default="", metavar="WORDS", help="do what has these words in its name")
    arguments = parser.parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a GPU, torch sees none; --device cpu is a dry run")
    if arguments.sanitize:
        arguments.workers = 0
    elif arguments.workers is None:
        arguments.workers = 8 if arguments.device == "cuda" else 1
    if arguments.out is None and not arguments.sanitize:
        if arguments.device == "cpu":
            parser.error("--out: expected a file, a dry run leaves nothing under bench/results")
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        arguments.out = Path(__file__).parent / "results" / name / "gpu.json"
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    if arguments.device == "cpu":
        # read when a kernel is defined, so it must stand before the first import of one, here and in other processes
        os.environ["TRITON_INTERPRET"] = "1"
    if arguments.sanitize:
        # a pool would hide a step beyond a tensor's end
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    report = Report(arguments)
    report.write()
    # the checks side by side, the times one by one
    for section, tasks in build_tasks(arguments).items():
        share = CHECK_SHARE if section == "checks" and not arguments.sanitize else 1.0
        run_tasks(
            tasks,
            partial(report.tell, section.removeprefix("more ")),
            deadline=report.begun + share * arguments.minutes * 60,
            processes=arguments.workers if section == "checks" else min(1, arguments.workers),
        )
        report.content["clocks"][f"after {section}"] = clocks()
    report.write()
    print(f"{report.summary()}\n{arguments.out or ''}")
    return int(any("failed" in result for result in report.content["checks"].values())) if arguments.sanitize else 0


if __name__ == "__main__":
    sys.exit(main())
