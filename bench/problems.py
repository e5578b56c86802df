"""Problems of any size, drawn where they are read, and the truth about some queries of one too large to know whole."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stm_kernels import merge_reads
from stm_kernels.affinity import wide_dtype
from stm_kernels.testing import Problem, allowed_error_shares, results


def draw_problem(
    B: int,
    M: int,
    N: int,
    C: int,
    V: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    tracked: bool = False,
    channel_major: bool = False,
    seed: int = 0,
) -> Problem:
    """Draw a problem of any size, on its device and in its dtype: quick where `make_problem` is the same everywhere.

    Args:
        B, M, N, C, V, dtype, device, channel_major, seed: as in `make_problem`.
        tracked: make the affinity peaked, as a trained network's is: neighbours in a frame are alike, and the memory
            shows the frame of the query again and again, with noise, so that a query reads few places of each frame.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(B, *shape, generator=generator, dtype=of, device=device)

    if tracked:
        # the sum of four normal numbers of which neighbours share three, at a standard deviation of 2
        line = draw(M + 3, C)
        query_key = sum(line[:, shift : shift + M] for shift in range(4))
        places = torch.arange(N, device=device) % M
        memory_key = query_key[:, places] / 2 + draw(N, C) / 4
    else:
        query_key, memory_key = draw(M, C), draw(N, C)
    tensors = [query_key, memory_key, draw(N, V), draw(M, V)]
    if channel_major:
        tensors = [tensor.mT.contiguous().mT for tensor in tensors]
    query_key, memory_key, memory_value, grad_out = tensors
    return Problem(query_key, memory_key, memory_value, C**-0.5, grad_out, draw(M, of=wide_dtype(dtype)))


@dataclass(frozen=True)
class Sample:
    """Some queries of a problem too large to know in full: the whole memory is read, by few."""

    queries: Tensor
    """Their indices."""
    truth: dict[str, Tensor]
    """`out` and `lse` of these queries in float64."""
    plain: dict[str, Tensor]
    """The same of plain PyTorch in the problem's dtype."""

    def ratios(self, found: dict[str, Tensor], slack: float = 0.0) -> dict[str, float]:
        """`allowed_error_shares` of the `out` and, if there, the `lse` of all queries."""
        found = {name: found[name][:, self.queries] for name in ("out", "lse") if name in found}
        return allowed_error_shares(self.truth, self.plain, found, slack)


def sample_of(problem: Problem, count: int = 64, positions_at_once: int = 2**17) -> Sample:
    """Know some queries of a problem without `lengths`, the first and the last among them.

    Args:
        problem: in the dtype to judge.
        count: how many queries.
        positions_at_once: memory positions that are held in float64 together; a top-k read needs all.
    """
    assert problem.lengths is None
    M, N = problem.query_key.shape[1], problem.memory_key.shape[1]
    queries = torch.linspace(0, M - 1, min(count, M), device=problem.query_key.device).round().long()
    few = replace(
        problem,
        query_key=problem.query_key[:, queries],
        grad_out=problem.grad_out[:, queries],
        grad_lse=problem.grad_lse[:, queries],
    )
    parts = []
    for start in range(0, N, N if problem.top_k else positions_at_once):
        chunk = slice(start, N if problem.top_k else start + positions_at_once)
        bias = None if few.key_bias is None else few.key_bias[:, chunk]
        part = replace(few, memory_key=few.memory_key[:, chunk], memory_value=few.memory_value[:, chunk], key_bias=bias)
        parts.append(results(part.to(torch.float64), gradients=False))
    out, lse = merge_reads(*(torch.stack([part[name] for part in parts]) for name in ("out", "lse")))
    return Sample(queries, {"out": out, "lse": lse}, results(few, gradients=False))
