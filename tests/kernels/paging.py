"""Memories in pages for the tests."""

import torch

from stm_kernels import PagedMemory

B, C, V = 2, 16, 24


def filled(problem, page_size: int, frame: int = 7, **options) -> PagedMemory:
    memory = PagedMemory(B, C, V, page_size=page_size, dtype=problem.memory_key.dtype, **options)
    for key, value in zip(problem.memory_key.split(frame, 1), problem.memory_value.split(frame, 1)):
        memory.append(key, value)
    return memory


def held_by(memory: PagedMemory) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and all values, in their order."""
    keys, values = zip(*memory.state()["pages"])
    return torch.cat([key.cpu() for key in keys], 1), torch.cat([value.cpu() for value in values], 1)
