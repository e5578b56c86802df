"""The read, the memory it reads from, and how that grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.read import both_ways, forward, naive_read, some_queries
from stm_kernels import PagedMemory, memory_read
from stm_kernels.testing import Problem, error_ratios, make_problem, read_by
from stm_model.runtime import default_dtype

# where it is emulated a round of the naive read takes many seconds; that ours is right there is for the tests
native_bfloat16 = pytest.mark.skipif(default_dtype("cpu") != torch.bfloat16, reason="this CPU emulates bfloat16")
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16", marks=native_bfloat16),
]
C, V = 128, 512


def problem_of(quick: bool, dtype: torch.dtype) -> Problem:
    """480p and 20 remembered frames, or 240p and 60."""
    positions, frames = (405, 60) if quick else (1620, 20)
    return make_problem(1, positions, frames * positions, C, V, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_read_forward(race: Callable, quick: bool, dtype: torch.dtype) -> None:
    problem = problem_of(quick, dtype)
    assert max(error_ratios(some_queries(problem), read_by("auto")).values()) <= 1
    least = 0.8 if dtype == torch.float32 else 0.4
    race(forward(problem, memory_read), forward(problem, naive_read), 15, least)


@pytest.mark.parametrize("dtype", DTYPES)
def test_read_forward_and_backward(race: Callable, quick: bool, dtype: torch.dtype) -> None:
    problem = problem_of(quick, dtype)
    assert max(error_ratios(some_queries(problem), read_by("auto")).values()) <= 1
    least = 0.7 if dtype == torch.float32 else 0.4
    race(both_ways(problem, memory_read), both_ways(problem, naive_read), 9, least)


def test_paged_read(race: Callable, quick: bool) -> None:
    """Frames appended one by one, against frames joined by `torch.cat` for every read."""
    problem = problem_of(quick, torch.float32)
    frames = problem.memory_key.shape[1] // problem.query_key.shape[1]
    keys, values = problem.memory_key.chunk(frames, 1), problem.memory_value.chunk(frames, 1)
    memory = PagedMemory(1, C, V, page_size=4 * keys[0].shape[1])
    for key, value in zip(keys, values, strict=True):
        memory.append(key, value)

    def paged(query_key: Tensor, *_: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return memory.read(query_key, **options, return_lse=True)

    assert max(error_ratios(some_queries(problem), paged, gradients=False).values()) <= 1
    query_key, scale = problem.query_key, problem.scale
    race(
        lambda: memory.read(query_key, scale=scale),
        lambda: naive_read(query_key, torch.cat(keys, 1), torch.cat(values, 1), scale),
        15,
        0.9,
    )


def test_memory_append(race: Callable, quick: bool) -> None:
    """One more frame after 100 others, against `torch.cat`, which copies those too."""
    positions, frames = (405, 40) if quick else (1620, 100)
    key, value = torch.randn(1, positions, C), torch.randn(1, positions, V)
    held = key.repeat(1, frames, 1), value.repeat(1, frames, 1)
    memory = PagedMemory(1, C, V, page_size=8 * positions)
    memory.append(*held)

    def append() -> None:
        memory.append(key, value)

    def append_and_forget() -> None:
        append()
        memory.drop(positions)

    joined = torch.cat([held[1], value], 1)
    append()
    assert torch.equal(torch.cat([part for _, part in memory.state()["pages"]], 1), joined)
    memory.drop(positions)
    race(append_and_forget, lambda: (torch.cat([held[0], key], 1), torch.cat([held[1], value], 1)), 30, 3)
