"""Parts of a read side by side, each on one thread.

An operation on a chunk that stays in the caches takes tens of microseconds. Shared among PyTorch's threads it would
wait for them longer than that, at worst where they sleep (OMP_WAIT_POLICY=PASSIVE) or have no core of their own.
"""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from stm_kernels.cpu.gemm import Scratch, even_slices

Task = TypeVar("Task")
Result = TypeVar("Result")
Block = tuple[int, slice]
"""A batch item and some of its queries."""

MIN_QUERIES = 64
"""A block has no fewer: products with few rows are slow."""


def blocks_of(B: int, M: int, longest: int, device: torch.device) -> list[Block]:
    """The queries of all batch items in blocks of at most `longest`, as many for each thread where they are enough."""
    count = max(1, -(-M // longest))
    while B * count % threads_of(device) and M >= (count + 1) * MIN_QUERIES:
        count += 1
    return [(item, block) for item in range(B) for block in even_slices(M, -(-M // count))]


def threads_of(device: torch.device) -> int:
    """How many threads compute on a device's behalf."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def side_by_side(
    work: Callable[[Sequence[Task], Scratch], Result], tasks: Sequence[Task], device: torch.device
) -> list[Result]:
    """Deal tasks out to as many threads as PyTorch has, each of which does `work` on its own, with its own buffers.

    Returns:
        What each thread's work returned, in the order of the threads; on one thread `work` runs in the caller's.
    """
    count = max(1, min(threads_of(device), len(tasks)))
    if count == 1:
        return [work(tasks, Scratch(device))]
    inference = torch.is_inference_mode_enabled()

    def part(first: int) -> Result:
        # both are a thread's own
        with torch.inference_mode(inference), torch.no_grad():
            return work(tasks[first::count], Scratch(device))

    return list(_pool(torch.get_num_threads()).map(part, range(count)))


@functools.cache
def _pool(count: int) -> ThreadPoolExecutor:
    """So many threads, each of which computes alone."""
    pool, started = ThreadPoolExecutor(count, "memory_read"), threading.Barrier(count)

    def start(_: int) -> None:
        # the first question in a thread sets it to what all threads begin with
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    list(pool.map(start, range(count)))
    # what a thread sets for itself, threads that are yet to come would begin with
    torch.set_num_threads(count)
    return pool


# a process that is forked has the pool but not its threads; Windows has no forks
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
