"""An STCN-style read: L2 similarity, the best positions alone, one set of keys for all objects.

python examples/stcn.py
"""

import torch
from compare import report
from einops import rearrange
from torch import Tensor, nn

from stm_kernels import space_time_memory_read


class Before(nn.Module):
    """Affinity, choice and readout as separate steps, which hold the affinity three times."""

    def __init__(self, top_k: int = 20) -> None:
        super().__init__()
        self.top_k = top_k

    def forward(self, memory_key: Tensor, memory_value: Tensor, query_key: Tensor) -> Tensor:
        """`[1, C, T, H, W]`, `[K, V, T, H, W]`, `[1, C, H, W]` → `[K, V, H, W]`, K objects."""
        keys, queries = memory_key.flatten(2), query_key.flatten(2)
        squares = keys.square().sum(1)[:, :, None]
        logits = (2 * keys.mT @ queries - squares) / keys.shape[1] ** 0.5
        best, positions = logits.topk(self.top_k, dim=1)
        affinity = torch.zeros_like(logits).scatter(1, positions, best.softmax(1))
        read = memory_value.flatten(2) @ affinity
        return rearrange(read, "k v (h w) -> k v h w", h=query_key.shape[2])


class After(nn.Module):
    """The objects' values lie side by side, so that one affinity serves all; it is never held."""

    def __init__(self, top_k: int = 20) -> None:
        super().__init__()
        self.top_k = top_k

    def forward(self, memory_key: Tensor, memory_value: Tensor, query_key: Tensor) -> Tensor:
        """`[1, C, T, H, W]`, `[K, V, T, H, W]`, `[1, C, H, W]` → `[K, V, H, W]`, K objects."""
        values = rearrange(memory_value, "k v t h w -> 1 (k v) t h w")
        read = space_time_memory_read(query_key, memory_key, values, similarity="l2", top_k=self.top_k)
        return rearrange(read, "1 (k v) h w -> k v h w", k=len(memory_value))


def inputs(seed: int) -> dict[str, Tensor]:
    """Three objects, four remembered frames."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"memory_key": (1, 64, 4, 6, 7), "memory_value": (3, 512, 4, 6, 7), "query_key": (1, 64, 6, 7)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


if __name__ == "__main__":
    report(Before(), After(), inputs)
