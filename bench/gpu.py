"""All that a GPU can tell about the read, in one command: python bench/gpu.py [--minutes 9] [--quick] [--first-minute]

First whether every variant is right on the device, then the ceilings of matrix products and copies, then time and
memory of every reader at every size, forward and backward, the most important sizes first. What is wrong gets no time.
The JSON is rewritten as results come, so a run that is stopped leaves what it had. Needs PyTorch, Triton, NumPy and
einops alone; `python -m pytest tests/kernels` runs every test of the kernels on the GPU beside it.

    python bench/gpu.py --first-minute    # is each kernel right at two sizes, how fast is the read at three
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# a machine with a GPU may run a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.gpu_checks import Ratios, checks_of, first_checks, judged, pages_of
from bench.gpu_readers import READERS, backward_tiles_of, chosen, tiles_of, timed
from bench.harness import MIB, Result, Task, clocks, describe, run_tasks, table, write_json
from bench.read import CHOICES, WAYS, Size, both_ways, draw_problem, errors
from stm_kernels.testing import Problem, allowed_error_shares, extra_memory, results

CHECK_SHARE = 0.4
"""Of the time, for finding out what is right."""
FIRST_SHARE = 0.7
"""Likewise of the first minute."""
JUDGED_POSITIONS = 4096
"""Of the memory with which gradients are judged."""
MOST_IMPORTANT = (Size(1620, 20), Size(1620, 1000), Size(576, 5))
FRAMES, MEMORIES = (576, 1620, 3600, 8160), (1, 5, 20, 100, 1000)

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
    if arguments.first_minute:
        sections["checks"] |= {f"compile, {size}": partial(run_once, size, device) for size in sizes(device, True)}
    for dtype in dtypes_of(device):
        for name in (first_checks if arguments.first_minute else checks_of)(device, dtype, tiny):
            sections["checks"][f"{dtype}: {name}"] = partial(check, device, dtype, tiny, name)
    if arguments.first_minute:
        sections["reads"] = cells(device, sizes(device, True), ("forward",), ("ours",))
    elif not arguments.sanitize:
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


def run_once(size: Size, device: str) -> Result:
    """A read whose kernels are compiled then, beside the checks, when it is timed."""
    WAYS["forward"](draw_problem(size, dtypes_of(device)[0], device), READERS["ours"])()
    return {}


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


def cells(
    device: str, measured: list[Size], ways: Iterable[str] = WAYS, readers: Iterable[str] = READERS
) -> dict[str, Task]:
    """Readers at these sizes; a dry run leaves out what runs on a GPU alone."""
    if device == "cpu":
        readers = [reader for reader in readers if reader in ("ours", "naive")]
    return {
        f"{way}, {size}, {reader}": partial(cell, size, way, reader, device)
        for size, way, reader in itertools.product(measured, ways, readers)
    }


def tile_cells(device: str, important: list[Size]) -> dict[str, Task]:
    """Our tiles against each other."""
    dtype, (first, *_, last) = dtypes_of(device)[0], important
    kinds = [("forward", size, "forward", tiles_of(device, dtype, size.C, size.V)) for size in (first, last)]
    kinds.append(("forward + backward", first, "backward", backward_tiles_of(device, dtype, first.C)))
    tasks: dict[str, Task] = {}
    for way, size, kind, choices in kinds:
        for tiles in choices:
            name = f"{kind} tile " + "-".join(map(str, vars(tiles).values()))
            tasks[f"{way}, {size}, {name}"] = partial(cell, size, way, name, device, **{kind: tiles})
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


def cell(size: Size, way: str, reader: str, device: str, tracked: bool = False, **tiles: Any) -> Result:
    """Check a reader at a size, then measure it; without a check passed there is no time.

    Ours reads too where the reader is one of `CHOICES`, or the name of its `tiles`, which `chosen` takes.
    """
    choice = CHOICES.get(reader, {})
    skip = choice.get("skip", 0.0)
    read = READERS.get(reader) or partial(READERS["ours"], **choice)
    problem = replace(problem_of(size, device, tracked), top_k=choice.get("top_k"))
    found: Result = asdict(size) | {"way": way, "reader": reader, "tracked": tracked}
    with chosen(**tiles):
        ratios = errors(problem, read, skip)
        if way != "forward" and not skip:
            # which blocks a read skips depends on all of them; their gradients are for the tests
            ratios |= gradient_errors(problem, read)
        found |= {"dtype": str(dtypes_of(device)[0])} | judged(ratios)
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
        tasks[title] = partial(cell, size, way, name, device, tracked)
    return tasks


def paged(size: Size, device: str) -> Result:
    problem = problem_of(size, device)
    read = pages_of(problem, 32 if device == "cpu" else 16384, size.N)
    found = asdict(size) | judged(errors(problem, read))
    return found if "failed" in found else found | timed(WAYS["forward"](problem, read), device)


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
    parser.add_argument("--minutes", type=float, help="begin nothing new after that; default: 9")
    parser.add_argument("--first-minute", action="store_true", help="the most important; --minutes, 0.9, ends all")
    parser.add_argument("--quick", action="store_true", help="the three most important sizes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a dry run with tiny sizes")
    parser.add_argument("--out", type=Path, help="JSON file; default: bench/results/<device>/gpu.json")
    parser.add_argument("--workers", type=int, help="processes for the checks; 0 does everything in this one")
    parser.add_argument("--sanitize", action="store_true", help="only run every kernel once, for compute-sanitizer")
    parser.add_argument("--only", default="", metavar="WORDS", help="do what has these words in its name")
    arguments = parser.parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "--device: expected a GPU, torch sees none; --device cpu is a dry run\n")
    if arguments.minutes is None:
        # what is left of a minute when all is imported
        arguments.minutes = 0.9 if arguments.first_minute else 9.0
    if arguments.sanitize:
        arguments.workers = 0
    elif arguments.workers is None:
        most = 16 if arguments.first_minute else 8
        arguments.workers = min(most, os.cpu_count() or 1) if arguments.device == "cuda" else 1
    if arguments.out is None and not arguments.sanitize:
        if arguments.device == "cpu":
            parser.error("--out: expected a file, a dry run leaves nothing under bench/results")
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        arguments.out = (
            Path(__file__).parent / "results" / name / ("first_minute.json" if arguments.first_minute else "gpu.json")
        )
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
        share = FIRST_SHARE if arguments.first_minute else CHECK_SHARE
        if section != "checks" or arguments.sanitize:
            share = 1.0
        deadline = report.begun + share * arguments.minutes * 60
        run_tasks(
            tasks,
            partial(report.tell, section.removeprefix("more ")),
            deadline=deadline,
            end=deadline if arguments.first_minute else float("inf"),
            processes=arguments.workers if section == "checks" else min(1, arguments.workers),
        )
        report.content["clocks"][f"after {section}"] = clocks()
    report.write()
    print(f"{report.summary()}\n{arguments.out or ''}")
    return int(any("failed" in result for result in report.content["checks"].values())) if arguments.sanitize else 0


if __name__ == "__main__":
    sys.exit(main())
