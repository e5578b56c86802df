"""The read against what users of STM run, softmax(q @ k.mT * s) @ v: python bench/read.py [--out FILE]

480p at stride 16 (M = 1620) and 20 remembered frames (N = 32 400), C = 128, V = 512, forward and forward + backward, in
float32 and bfloat16, in alternation. Beside each time stand its share of the speed of a large matrix product and the
memory taken; before it the error over the error that the tests allow. Then `skip` and `top_k` on keys with which every
query looks at a neighbourhood in each frame.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import MIB, alternate, describe, options, table, write_json
from stm_kernels import memory_read
from stm_kernels.testing import (
    Problem,
    allowed_error_shares,
    error_ratios,
    extra_memory,
    make_problem,
    read_by,
    results,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHOICES: dict[str, dict[str, Any]] = {
    "exact": {},
    "skip=1e-3": {"skip": 1e-3},
    "skip=1e-2": {"skip": 1e-2},
    "top_k=16": {"top_k": 16},
}
CHECKED_QUERIES = 48


@dataclass(frozen=True)
class Sizes:
    """Of the read."""

    grid: tuple[int, int] = (30, 54)
    """Height and width of a frame in positions."""
    frames: int = 20
    """Remembered ones."""
    C: int = 128
    """Key channels."""
    V: int = 512
    """Value channels."""
    product: int = 2048
    """Rows and columns of the matrix product whose speed is the ceiling."""

    @property
    def M(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def N(self) -> int:
        return self.frames * self.M


def naive_read(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> Tensor:
    """What users of STM run: three copies of the affinity."""
    return torch.softmax(query_key @ memory_key.mT * scale, -1) @ memory_value


def inputs_of(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return problem.query_key, problem.memory_key, problem.memory_value


def forward(problem: Problem, read: Callable[..., Tensor]) -> Callable[[], Any]:
    inputs = inputs_of(problem)
    return lambda: read(*inputs, scale=problem.scale)


def both_ways(problem: Problem, read: Callable[..., Tensor]) -> Callable[[], Any]:
    inputs = [tensor.detach().requires_grad_() for tensor in inputs_of(problem)]
    return lambda: torch.autograd.grad(read(*inputs, scale=problem.scale), inputs, problem.grad_out)


WAYS = {"forward": forward, "forward + backward": both_ways}


def some_queries(problem: Problem) -> Problem:
    """The problem of a few of its queries, which float64 takes no time for."""
    rows = {name: getattr(problem, name)[:, :CHECKED_QUERIES] for name in ("query_key", "grad_out", "grad_lse")}
    return replace(problem, **{name: tensor.contiguous() for name, tensor in rows.items()})


def product(size: int, dtype: torch.dtype) -> Callable[[], Any]:
    """A large matrix product."""
    left, right = torch.randn(2, size, size).to(dtype)
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


def against_naive(size: Sizes, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Error, memory and seconds of both reads, and how many times faster ours is."""
    problem = make_problem(1, size.M, size.N, size.C, size.V, dtype=dtype)
    error = max(error_ratios(some_queries(problem), read_by("auto")).values())
    if not error <= 1:
        return {"failed": f"error over allowed error {error:.2f}"}
    functions = {"product": product(size.product, dtype)}
    functions |= {
        f"{name}, {way}": make(problem, read)
        for way, make in WAYS.items()
        for name, read in (("naive", naive_read), ("ours", memory_read))
    }
    seconds = alternate(functions, repeats)
    flops = 2 * size.M * size.N * (size.C + size.V)
    # the least of each: what else the machine does only adds
    rate = 2 * size.product**3 / seconds["product"]["least"]
    return {
        "error_over_allowed": error,
        "extra_bytes": {name: extra_memory(functions[f"{name}, forward"]) for name in ("naive", "ours")},
        "seconds": seconds,
        "times_faster": {way: seconds[f"naive, {way}"]["median"] / seconds[f"ours, {way}"]["median"] for way in WAYS},
        "share_of_product": {
            name: flops / seconds[f"{name}, forward"]["least"] / rate for name in ("naive", "ours")
        },
    }  # fmt: skip


def neighborhoods(size: Sizes, dtype: torch.dtype) -> Problem:
    """Keys whose dot product falls off with the distance: a query reads the cells around it in each frame."""
    problem = make_problem(1, size.M, size.N, size.C, size.V)
    places = torch.cartesian_prod(*(torch.arange(side) for side in size.grid)).float()
    generator = torch.Generator().manual_seed(0)
    # random Fourier features of a Gaussian of 3 cells
    waves = torch.randn(2, size.C, generator=generator) / 3
    phases = torch.rand(size.C, generator=generator) * 2 * torch.pi
    key = ((places @ waves + phases).cos() * (2 / size.C) ** 0.5 * (16 * size.C**0.5) ** 0.5)[None]
    return replace(problem, query_key=key, memory_key=key.repeat(1, size.frames, 1)).to(dtype)


def choices(size: Sizes, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Seconds of reads that leave positions out, the most weight left out, and their error over what they promise."""
    problem = neighborhoods(size, dtype)
    few = some_queries(problem)
    truth, plain = (results(each, gradients=False) for each in (few.to(torch.float64), few))
    largest = problem.memory_value.abs().max().item()
    found: dict[str, Any] = {}
    for name, choice in CHOICES.items():
        out, skipped = memory_read(*inputs_of(problem), **choice, return_skipped=True)
        if "top_k" in choice:
            error = error_ratios(replace(few, **choice), read_by("auto"), gradients=False)["out"]
        else:
            slack = 2 * choice.get("skip", 0.0) * largest
            error = allowed_error_shares(truth, plain, {"out": out[:, :CHECKED_QUERIES]}, slack)["out"]
        found[name] = {"most_left_out": skipped.max().item(), "error_over_allowed": error}
    reads = {name: partial(memory_read, **choice) for name, choice in CHOICES.items()}
    functions = {f"{name}, {way}": make(problem, read) for way, make in WAYS.items() for name, read in reads.items()}
    return found | {"seconds": alternate(functions, repeats)}


def show(name: str, found: dict[str, Any]) -> None:
    if "failed" in found:
        return print(f"{name}: {found['failed']}")
    columns = ("median", "least", "processor")
    rows = [(what, *(times[column] for column in columns)) for what, times in found["seconds"].items()]
    print(table((f"{name}, seconds", *columns), rows))
    if "times_faster" not in found:
        for choice in CHOICES:
            print(f"  {choice}: " + ", ".join(f"{key} {value:.2g}" for key, value in found[choice].items()))
        return
    memory = {reader: f"{held / MIB:.0f} MiB" for reader, held in found["extra_bytes"].items()}
    for what in ("times_faster", "share_of_product"):
        print(f"  {what.replace('_', ' ')}: " + ", ".join(f"{key} {value:.2f}" for key, value in found[what].items()))
    print(f"  extra memory {memory}, error over allowed {found['error_over_allowed']:.2f}", flush=True)


def main(words: Sequence[str] | None = None, size: Sizes | None = None) -> int:
    arguments = options(__doc__, repeats=5).parse_args(words)
    size = size or Sizes()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    report = describe("cpu") | {
        "sizes": {"M": size.M, "N": size.N, "C": size.C, "V": size.V},
        "reads": {},
        "choices": {},
    }
    for section, measure in (("reads", against_naive), ("choices", choices)):
        for name, dtype in DTYPES.items():
            report[section][name] = found = measure(size, dtype, arguments.repeats)
            show(f"{section}, {name}", found)
            write_json(report, arguments.out)
    return int(any("failed" in found for found in report["reads"].values()))


if __name__ == "__main__":
    sys.exit(main())
