"""Compile what reads of given sizes launch, for a GPU that need not be here, into Triton's cache."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from stm_kernels.affinity import Affinity
from stm_kernels.gpu.backward import triton_read_backward
from stm_kernels.gpu.forward import triton_read
from stm_kernels.gpu.launch import Elsewhere, elsewhere
from stm_kernels.gpu.top_k import triton_select
from stm_kernels.gpu.usage import triton_usage

# splits a memory, which changes the dtype in which parts are written
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304, "gfx1100": 48}
# B and M: one object and several; frames of 480 × 864 and of 384 × 384 pixels at stride 16
BATCHES, FRAMES = (1, 2), (1620, 576)
# T: whether N is a multiple of 16, and whether a read is split, is told apart by these
MEMORIES = (1, 3, 4, 20)
SIZES = [(B, M, T * M) for B, M, T in product(BATCHES, FRAMES, MEMORIES)]
FORMS = [f"{form}{way}" for way in ("", ", skip", ", top_k", ", usage") for form in ("dot", "l2", "bias")]


@dataclass(frozen=True)
class Filled:
    """A read whose kernels are compiled."""

    dtype: torch.dtype
    """Of the inputs."""
    B: int
    """Batch size."""
    M: int
    """Queries."""
    N: int
    """Memory positions."""
    C: int
    """Key channels."""
    V: int
    """Value channels."""

    def affinity(self) -> Affinity:
        """That of token-major keys without data."""
        query_key, memory_key = (self.empty(rows, self.C) for rows in (self.M, self.N))
        return Affinity(query_key, memory_key, self.C**-0.5)

    def empty(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.B, rows, columns, dtype=dtype or self.dtype, device="meta")


def reads(size: Filled) -> dict[str, Callable[[], object]]:
    """The reads of a size, by names in FORMS, each as the operator calls it."""
    affinity, value = size.affinity(), size.empty(size.N, size.V)
    bias = torch.empty(size.B, size.N, device="meta")
    squared, hiding = (replace(affinity, key_bias=bias, may_hide=may_hide) for may_hide in (False, True))

    def both_ways(affinity: Affinity, skip: float) -> None:
        out, lse, skipped, kept = triton_read(affinity, value, skip)
        triton_read_backward(torch.empty_like(out), lse, affinity, value, out, lse, skipped, kept)

    found: dict[str, Callable[[], object]] = {}
    for name, form in {"dot": affinity, "l2": squared, "bias": hiding}.items():
        found[name] = partial(both_ways, form, 0.0)
        found[f"{name}, skip"] = partial(both_ways, form, 1e-3)
        found[f"{name}, usage"] = partial(triton_usage, form, None)
        found[f"{name}, top_k"] = partial(triton_select, form, 30)
    return found


def fill(architecture: str, case: tuple[Filled, str]) -> set[str]:
    """Compile what one read launches; the keys under which Triton's cache has it."""
    size, name = case
    gpu = Elsewhere(architecture, MULTIPROCESSORS[architecture])
    with elsewhere(gpu):
        reads(size)[name]()
    return set(gpu.compiled)


def fill_cache(architecture: str, dtype: torch.dtype, C: int, V: int, sizes: list[tuple[int, int, int]] = SIZES) -> int:
    """Compile what reads, their backward passes and usages launch; how many kernels these are.

    Args:
        architecture: one of MULTIPROCESSORS.
        dtype: of the inputs.
        C, V: key and value channels.
        sizes: B, M and N.

    Raises:
        RuntimeError: the process runs Triton's interpreter, which compiles nothing.
    """
    filled = [Filled(dtype, *size, C, V) for size in sizes]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        keys = pool.map(partial(fill, architecture), [(size, name) for size in filled for name in FORMS])
        return len(set().union(*keys))
