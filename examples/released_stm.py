"""The released STM's `Memory` module: one line of the network around it changes.

python examples/released_stm.py
"""

import torch
from compare import report
from torch import Tensor, nn

from stm_kernels import SpaceTimeMemoryRead


class Memory(nn.Module):
    """The module as people have it: it holds the weight of every query position on every memory position."""

    def forward(
        self, memory_key: Tensor, memory_value: Tensor, query_key: Tensor, query_value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`[B, C, T, H, W]`, `[B, V, T, H, W]`, `[B, C, H, W]`, `[B, V, H, W]` → `[B, 2V, H, W]`, `[B, T·H·W, H·W]`."""
        logits = memory_key.flatten(2).mT @ query_key.flatten(2) / memory_key.shape[1] ** 0.5
        affinity = logits.softmax(1)
        read = (memory_value.flatten(2) @ affinity).view_as(query_value)
        return torch.cat([read, query_value], 1), affinity


class Before(nn.Module):
    """The network around it."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def forward(self, memory_key: Tensor, memory_value: Tensor, query_key: Tensor, query_value: Tensor) -> Tensor:
        features, _ = self.memory(memory_key, memory_value, query_key, query_value)
        return features


class After(nn.Module):
    """The network around it."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = SpaceTimeMemoryRead()

    def forward(self, memory_key: Tensor, memory_value: Tensor, query_key: Tensor, query_value: Tensor) -> Tensor:
        features, _ = self.memory(memory_key, memory_value, query_key, query_value)
        return features


def inputs(seed: int) -> dict[str, Tensor]:
    """Two objects, three remembered frames."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "memory_key": (2, 128, 3, 8, 9),
        "memory_value": (2, 512, 3, 8, 9),
        "query_key": (2, 128, 8, 9),
        "query_value": (2, 512, 8, 9),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


if __name__ == "__main__":
    report(Before(), After(), inputs)
