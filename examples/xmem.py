"""An XMem- or Cutie-style read: weighted L2 similarity, the best positions alone, many objects, and usage.

The logit of memory position n for query m is -shrinkage[n] / √C · Σ_c selection[c, m] · (key[c, n] - query[c, m])².
Multiplied out it is a dot product of 2·C + 1 channels: [2·selection·query, -selection, -Σ selection·query²] by
shrinkage · [key, key², 1].

python examples/xmem.py
"""

import torch
from compare import report
from einops import einsum, rearrange
from torch import Tensor, nn

from stm_kernels import memory_read, memory_usage


class Before(nn.Module):
    """Affinity, choice, usage and readout as separate steps, which hold the affinity three times."""

    def __init__(self, top_k: int = 30) -> None:
        super().__init__()
        self.top_k = top_k

    def forward(
        self, memory_key: Tensor, shrinkage: Tensor, query_key: Tensor, selection: Tensor, memory_value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`[B, C, N]`, `[B, 1, N]`, `[B, C, M]`, `[B, C, M]`, `[B, K, V, N]` → `[B, K, V, M]` and usage `[B, N]`."""
        distance = einsum(memory_key.square(), selection, "b c n, b c m -> b n m")
        distance = distance - 2 * einsum(memory_key, selection * query_key, "b c n, b c m -> b n m")
        distance = distance + (selection * query_key.square()).sum(1)[:, None]
        logits = -distance * shrinkage.mT / memory_key.shape[1] ** 0.5
        best, positions = logits.topk(self.top_k, dim=1)
        affinity = torch.zeros_like(logits).scatter(1, positions, best.softmax(1))
        read = einsum(memory_value, affinity, "b k v n, b n m -> b k v m")
        return read, affinity.detach().sum(2)


class After(nn.Module):
    """One read of all objects, and a second pass for the usage; neither holds the affinity."""

    def __init__(self, top_k: int = 30) -> None:
        super().__init__()
        self.top_k = top_k

    def forward(
        self, memory_key: Tensor, shrinkage: Tensor, query_key: Tensor, selection: Tensor, memory_value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`[B, C, N]`, `[B, 1, N]`, `[B, C, M]`, `[B, C, M]`, `[B, K, V, N]` → `[B, K, V, M]` and usage `[B, N]`."""
        keys = shrinkage * torch.cat([memory_key, memory_key.square(), torch.ones_like(shrinkage)], 1)
        square = (selection * query_key.square()).sum(1, keepdim=True)
        queries = torch.cat([2 * selection * query_key, -selection, -square], 1)
        scale = memory_key.shape[1] ** -0.5
        values = rearrange(memory_value, "b k v n -> b n (k v)")
        read = memory_read(queries.mT, keys.mT, values, scale=scale, top_k=self.top_k)
        usage = memory_usage(queries.mT, keys.mT, scale=scale, top_k=self.top_k)
        return rearrange(read, "b m (k v) -> b k v m", k=memory_value.shape[1]), usage


def inputs(seed: int) -> dict[str, Tensor]:
    """Two videos of three objects, four remembered frames of 6×7 positions."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "memory_key": draw(2, 64, 168),
        "shrinkage": 1 + draw(2, 1, 168).square(),
        "query_key": draw(2, 64, 42),
        "selection": draw(2, 64, 42).sigmoid(),
        "memory_value": draw(2, 3, 512, 168),
    }


if __name__ == "__main__":
    report(Before(), After(), inputs)
