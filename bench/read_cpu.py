"""The read on a CPU against the naive one: python bench/read_cpu.py [--out bench/results/<device>/read.json]

480p at stride 16 (M = 1620) and 20 remembered frames (N = 32 400), C = 128, V = 512, forward and forward + backward, in
float32 and bfloat16; one process, all variants timed in alternation. Beside each time stand the useful operations per
second as a share of those of a large matrix product, the memory taken, and the error over the error allowed by the
yardstick of the tests. Then reads that may leave weight out, where every query looks at a neighbourhood in each frame.
A machine with other work stretches the time on the wall; the time on the processor, of both threads, moves less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stm_kernels import memory_read
from stm_kernels.testing import Problem, error_ratios, extra_memory, make_problem, read_by

HEIGHT, WIDTH, FRAMES, C, V = 30, 54, 20, 128, 512
MM_SIZE = 2048
CHECKED_QUERIES = 48
SKIPS = (1e-3, 1e-2)

Times = dict[str, dict[str, float]]


def naive_read(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> Tensor:
    """What users of STM run: three copies of the affinity."""
    return torch.softmax(query_key @ memory_key.mT * scale, -1) @ memory_value


def forward(problem: Problem, read: Callable[..., Tensor]) -> Callable[[], Any]:
    inputs = (problem.query_key, problem.memory_key, problem.memory_value)
    return lambda: read(*inputs, scale=problem.scale)


def forward_and_backward(problem: Problem, read: Callable[..., Tensor]) -> Callable[[], Any]:
    inputs = [t.detach().requires_grad_() for t in (problem.query_key, problem.memory_key, problem.memory_value)]
    return lambda: torch.autograd.grad(read(*inputs, scale=problem.scale), inputs, problem.grad_out)


def matrix_product(dtype: torch.dtype) -> Callable[[], Any]:
    left, right = torch.randn(2, MM_SIZE, MM_SIZE).to(dtype)
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


def timed(functions: dict[str, Callable[[], Any]], repeats: int) -> Times:
    """Seconds on the wall, and of all threads on the processor, in alternation after one run unmeasured."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            wall, processor = time.perf_counter(), time.process_time()
            function()
            if repeat:
                found[name].append((time.perf_counter() - wall, time.process_time() - processor))
    times = {}
    for name, pairs in found.items():
        walls, processors = zip(*pairs)
        times[name] = {
            "median": statistics.median(walls),
            "least": min(walls),
            "most": max(walls),
            "processor": statistics.median(processors),
        }
    return times


def worst_ratio(problem: Problem) -> float:
    """The error over the allowed error of some of the queries, read and gradients, the worst of all results."""
    some = slice(0, CHECKED_QUERIES)
    rows = {name: getattr(problem, name)[:, some].contiguous() for name in ("query_key", "grad_out", "grad_lse")}
    return max(error_ratios(replace(problem, **rows), read_by("chunked")).values())


def measure(dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    problem = make_problem(1, HEIGHT * WIDTH, FRAMES * HEIGHT * WIDTH, C, V, dtype=dtype)
    reads = {"naive": naive_read, "chunked": memory_read}
    functions = {"mm": matrix_product(dtype)}
    functions |= {f"{name} forward": forward(problem, read) for name, read in reads.items()}
    functions |= {f"{name} forward + backward": forward_and_backward(problem, read) for name, read in reads.items()}
    memory = {name: extra_memory(functions[f"{name} forward"]) for name in reads}
    return {
        "error_over_allowed": worst_ratio(problem),
        "extra_bytes": memory,
        "seconds": timed(functions, repeats),
    }


def neighbourhoods(dtype: torch.dtype) -> Problem:
    """Keys whose dot product falls off with the distance: a query reads the cells around it in each frame."""
    problem = make_problem(1, HEIGHT * WIDTH, FRAMES * HEIGHT * WIDTH, C, V)
    places = torch.cartesian_prod(torch.arange(HEIGHT), torch.arange(WIDTH)).float()
    generator = torch.Generator().manual_seed(0)
    # random Fourier features of a Gaussian of 3 cells
    waves, phases = torch.randn(2, C, generator=generator) / 3, torch.rand(C, generator=generator) * 2 * torch.pi
    features = (places @ waves + phases).cos() * (2 / C) ** 0.5
    key = (features * (16 * C**0.5) ** 0.5)[None]
    return replace(problem, query_key=key, memory_key=key.repeat(1, FRAMES, 1)).to(dtype)


def measure_skips(dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    problem = neighbourhoods(dtype)
    inputs = (problem.query_key, problem.memory_key, problem.memory_value)
    exact = memory_read(*inputs).double()
    functions, rows = {}, {}
    for skip in (0.0, *SKIPS):

        def read(*inputs: Tensor, scale: float, skip: float = skip) -> Tensor:
            return memory_read(*inputs, scale=scale, skip=skip)

        functions[f"{skip:g} forward"] = forward(problem, read)
        functions[f"{skip:g} forward + backward"] = forward_and_backward(problem, read)
        if skip:
            out, skipped = memory_read(*inputs, skip=skip, return_skipped=True)
            rounding = torch.finfo(dtype).eps * exact.abs().max()
            bound = 2 * skipped * problem.memory_value.abs().max() + rounding
            rows[f"{skip:g}"] = {
                "blocks_read": blocks_read(problem, skip),
                "most_left_out": skipped.max().item(),
                "error_over_bound": ((out.double() - exact).abs().amax(2) / bound).max().item(),
            }
    return {"choices": rows, "seconds": timed(functions, repeats)}


def blocks_read(problem: Problem, skip: float) -> float:
    """The share of the blocks of queries and positions whose values are read."""
    inputs = (problem.query_key, problem.memory_key, problem.memory_value, None, None)
    return torch.ops.stm_kernels.memory_read(*inputs, problem.scale, 0, skip, "chunked")[3].float().mean().item()


def table(results: dict[str, Any]) -> str:
    lines = []
    for dtype, found in results["reads"].items():
        times, memory = found["seconds"], found["extra_bytes"]
        lines.append(f"{dtype}: error over allowed {found['error_over_allowed']:.2f}, {spread(times)}")
        lines.append(f"  {'':28}{'median':>9}{'least':>9}{'processor':>11}{'of mm':>7}{'memory':>12}")
        for name, row in times.items():
            share = ""
            if name.endswith("forward"):
                # the least of each: what else the machine does only adds
                flops = 2 * HEIGHT * WIDTH * HEIGHT * WIDTH * FRAMES * (C + V)
                share = f"{flops / row['least'] / (2 * MM_SIZE**3 / times['mm']['least']):.2f}"
            held = f"{memory[name.split()[0]] / 2**20:.0f} MiB" if name.endswith("forward") else ""
            seconds = f"{row['median']:9.3f}{row['least']:9.3f}{row['processor']:11.3f}"
            lines.append(f"  {name:28}{seconds}{share:>7}{held:>12}")
        for what in ("forward", "forward + backward"):
            naive, chunked = times[f"naive {what}"], times[f"chunked {what}"]
            ratios = ", ".join(f"{naive[key] / chunked[key]:.2f} by {key}" for key in ("median", "least", "processor"))
            lines.append(f"  {what}: times faster than naive {ratios}")
    for dtype, found in results["skips"].items():
        lines.append(f"{dtype}, neighbourhoods, weight that may be left out:")
        for name, row in found["seconds"].items():
            choice = found["choices"].get(name.split()[0])
            note = "".join(f"  {key} {value:.3g}" for key, value in (choice or {}).items()) if "+" not in name else ""
            lines.append(f"  {name:28}{row['median']:9.3f}{row['least']:9.3f}{row['processor']:11.3f}{note}")
    return "\n".join(lines)


def spread(times: Times) -> str:
    return f"the slowest run {max(row['most'] / row['least'] for row in times.values()):.1f} times the fastest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    results = {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "threads": arguments.threads,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "sizes": {"M": HEIGHT * WIDTH, "N": FRAMES * HEIGHT * WIDTH, "C": C, "V": V},
        "reads": {name: measure(dtype, arguments.repeats) for name, dtype in dtypes.items()},
        "skips": {name: measure_skips(dtype, arguments.repeats) for name, dtype in dtypes.items()},
    }
    # what else the machine did: processes that wanted to run, before and after
    results["load"] = [load, os.getloadavg()[0]]
    print(table(results))
    print(f"processes that wanted to run on {os.cpu_count()} cores: {load:.1f} before, {results['load'][1]:.1f} after")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
