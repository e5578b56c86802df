"""The read against what users of STM run, softmax(q @ k.mT * s) @ v: python bench/read.py [--out FILE]

480p at stride 16 (M = 1620) and 20 remembered frames (N = 32 400), C = 128, V = 512, forward and forward + backward, in
float32 and bfloat16, in alternation, with the memory taken and the error over the error that the tests allow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import MIB, alternate, describe, options, table, write_json
from stm_kernels import memory_read, merge_reads
from stm_kernels.testing import Problem, allowed_error_shares, error_ratios, extra_memory, read_by, results

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHOICES: dict[str, dict[str, Any]] = {
    "exact": {},
    "skip=1e-3": {"skip": 1e-3},
    "skip=1e-2": {"skip": 1e-2},
    "top_k=16": {"top_k": 16},
    "top_k=32": {"top_k": 32},
}
CHECKED_QUERIES = 48
WIDE_POSITIONS = 2**17
"""Memory positions that are held in float64 at once."""


@dataclass(frozen=True)
class Size:
    """A read of `B` objects: a frame of `M` positions asks a memory of `T` such frames."""

    M: int
    T: int
    B: int = 1
    C: int = 128
    V: int = 512

    @property
    def N(self) -> int:
        """Memory positions."""
        return self.M * self.T

    def __str__(self) -> str:
        return f"M={self.M} T={self.T} B={self.B}"

    def flops(self, way: str = "forward") -> float:
        """The operations that no algorithm can do without: forward two products, backward five."""
        pairs = 2.0 * self.B * self.M * self.N
        forward = pairs * (self.C + self.V)
        return forward if way == "forward" else forward + pairs * (3 * self.C + 2 * self.V)


def draw_problem(
    size: Size, dtype: torch.dtype, device: torch.device | str = "cpu", tracked: bool = False, seed: int = 0
) -> Problem:
    """Draw a problem of any size on its device: quick where `make_problem` is the same everywhere.

    Args:
        size, dtype, device, seed: of the problem.
        tracked: make the affinity peaked, as a trained network's is: neighbors in a frame are alike, and the memory
            shows the frame of the query again and again, with noise, so that a query reads few places of each frame.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(size.B, rows, columns, generator=generator, dtype=of, device=device)

    if tracked:
        # the sum of four normal numbers of which neighbors share three, at a standard deviation of 2
        line = draw(size.M + 3, size.C)
        query_key = sum(line[:, shift : shift + size.M] for shift in range(4))
        memory_key = query_key.repeat(1, size.T, 1) / 2 + draw(size.N, size.C) / 4
    else:
        query_key, memory_key = draw(size.M, size.C), draw(size.N, size.C)
    value, grad_out = draw(size.N, size.V), draw(size.M, size.V)
    return Problem(query_key, memory_key, value, size.C**-0.5, grad_out, draw(size.M, 1, torch.float32)[..., 0])


def naive_read(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> Tensor:
    """What users of STM run: three copies of the affinity."""
    return torch.softmax(query_key @ memory_key.mT * scale, -1) @ memory_value


def inputs_of(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return problem.query_key, problem.memory_key, problem.memory_value


def forward(problem: Problem, read: Callable[..., Tensor]) -> Callable[[], Any]:
    inputs = inputs_of(problem)
    return torch.no_grad()(lambda: read(*inputs, scale=problem.scale))


def both_ways(problem: Problem, read: Callable[..., Tensor]) -> Callable[[], Any]:
    inputs = [tensor.detach().requires_grad_() for tensor in inputs_of(problem)]
    return lambda: torch.autograd.grad(read(*inputs, scale=problem.scale), inputs, problem.grad_out)


WAYS = {"forward": forward, "forward + backward": both_ways}


def checked_queries(problem: Problem) -> Tensor:
    """Indices of a few queries, the first and the last among them, which float64 takes no time for."""
    M = problem.query_key.shape[1]
    return torch.linspace(0, M - 1, min(CHECKED_QUERIES, M), device=problem.query_key.device).round().long()


def some_queries(problem: Problem) -> Problem:
    """The problem of its checked queries."""
    queries = checked_queries(problem)
    return replace(
        problem, **{name: getattr(problem, name)[:, queries] for name in ("query_key", "grad_out", "grad_lse")}
    )


def known(problem: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a read of the checked queries gives, in float64 and by plain PyTorch in the problem's dtype."""
    few = some_queries(problem)
    plain = results(few, gradients=False)
    if problem.top_k:
        return results(few.to(torch.float64), gradients=False), plain
    parts = []
    for key, value in zip(few.memory_key.split(WIDE_POSITIONS, 1), few.memory_value.split(WIDE_POSITIONS, 1)):
        part = replace(few, memory_key=key, memory_value=value).to(torch.float64)
        parts.append(results(part, gradients=False))
    out, lse = merge_reads(*(torch.stack([part[name] for part in parts]) for name in ("out", "lse")))
    return {"out": out, "lse": lse}, plain


def errors(problem: Problem, read: Callable[..., Any], skip: float = 0.0) -> dict[str, float]:
    """Error over allowed error of the checked queries when all are read; gradients are not looked at.

    Args:
        problem: in the dtype to judge.
        read: gives what is read or a tuple that begins with it and the log-sum-exp.
        skip: the mass that a query may drop: it moves the read by at most twice its share of the largest value.
    """
    found = forward(problem, read)()
    found = dict(zip(("out", "lse"), found if isinstance(found, tuple) else [found]))
    found = {name: tensor[:, checked_queries(problem)] for name, tensor in found.items()}
    truth, plain = known(problem)
    slack = 2 * skip * problem.memory_value.abs().max().item()
    return allowed_error_shares(truth, plain, {"out": found.pop("out")}, slack) | allowed_error_shares(
        truth, plain, found
    )


def against_naive(size: Size, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Error, memory and seconds of both reads, and how many times faster ours is."""
    problem = draw_problem(size, dtype)
    error = max(error_ratios(some_queries(problem), read_by("auto")).values())
    if not error <= 1:
        return {"failed": f"error over allowed error {error:.2f}"}
    reads: dict[str, Callable[..., Tensor]] = {"naive": naive_read, "ours": memory_read}
    functions = {f"{name}, {way}": make(problem, read) for way, make in WAYS.items() for name, read in reads.items()}
    seconds = alternate(functions, repeats)
    return {
        "error_over_allowed": error,
        "extra_bytes": {name: extra_memory(functions[f"{name}, forward"]) for name in reads},
        "seconds": seconds,
        "times_faster": {way: seconds[f"naive, {way}"]["median"] / seconds[f"ours, {way}"]["median"] for way in WAYS},
    }


def show(name: str, found: dict[str, Any]) -> None:
    if "failed" in found:
        return print(f"{name}: {found['failed']}")
    columns = ("median", "least", "processor")
    rows = [(what, *(times[column] for column in columns)) for what, times in found["seconds"].items()]
    print(table((f"{name}, seconds", *columns), rows))
    for way, ratio in found["times_faster"].items():
        print(f"  times faster, {way}: {ratio:.2f}")
    print("  extra MiB: " + ", ".join(f"{who} {size / MIB:.1f}" for who, size in found["extra_bytes"].items()))


def main(words: Sequence[str] | None = None, size: Size | None = None) -> int:
    arguments = options(__doc__, repeats=5).parse_args(words)
    torch.set_num_threads(arguments.threads)
    size = size or Size(1620, 20)
    report = describe("cpu") | {"sizes": {"M": size.M, "N": size.N, "C": size.C, "V": size.V}, "reads": {}}
    for name, dtype in DTYPES.items():
        report["reads"][name] = found = against_naive(size, dtype, arguments.repeats)
        show(name, found)
        write_json(report, arguments.out)
    return int(any("failed" in found for found in report["reads"].values()))


if __name__ == "__main__":
    sys.exit(main())
