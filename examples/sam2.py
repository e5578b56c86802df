"""SAM-2-style memory attention: a frame's tokens ask a memory of narrower tokens, by heads, with rotary positions.

With one head of 256 channels, or four of 64, keys and values have the same width; each head is an item of the batch.

python examples/sam2.py
"""

import torch
from compare import report
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from stm_kernels import memory_read


class MemoryAttention(nn.Module):
    """What surrounds the read: projections into heads, and rotary positions of all but the last memory tokens."""

    def __init__(self, heads: int = 1, width: int = 256, memory_width: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory_width, width)
        self.value = nn.Linear(memory_width, width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, memory: Tensor, pointers: Tensor) -> Tensor:
        """`[B, H, W, D]` frame, `[B, T, H, W, d]` memory, `[B, P, d]` object pointers → `[B, H·W, D]`."""
        B, T, H, W, _ = memory.shape
        turns = rotations(H, W, self.query.out_features // self.heads, tokens)
        memory = torch.cat([memory.flatten(1, 3), pointers], 1)
        query, key, value = (
            rearrange(project(x), "b n (h c) -> b h n c", h=self.heads)
            for project, x in ((self.query, tokens.flatten(1, 2)), (self.key, memory), (self.value, memory))
        )
        placed = T * H * W  # pointers have no place
        key = torch.cat([rotate(key[:, :, :placed], turns.repeat(T, 1, 1)), key[:, :, placed:]], 2)
        read = self.read(rotate(query, turns), key, value)
        return self.out(rearrange(read, "b h n c -> b n (h c)"))


class Before(MemoryAttention):
    """The attention that PyTorch has, which takes memories of one length."""

    def read(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value)


class After(MemoryAttention):
    """The same by the read, which also takes `lengths`, `key_bias`, `top_k` and pages on the host."""

    def read(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = query.shape[:2]
        read = memory_read(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1))
        return read.unflatten(0, heads)


def rotations(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Cosine and sine `[H·W, 2, channels / 2]` of every place: half of the channels turn by row, half by column."""
    frequencies = 10000.0 ** -(torch.arange(channels // 4, device=like.device) / (channels // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1).to(frequencies)
    angles = (places[:, :, None] * frequencies).flatten(1)
    return torch.stack([angles.cos(), angles.sin()], 1).to(like)


def rotate(tokens: Tensor, turns: Tensor) -> Tensor:
    """`[…, N, C]` with every pair of channels turned by `[N, 2, C / 2]`."""
    (cosine, sine), (left, right) = turns.unbind(1), tokens.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([left * cosine - right * sine, left * sine + right * cosine], -1).flatten(-2)


def inputs(seed: int) -> dict[str, Tensor]:
    """Two objects, three remembered frames and eight pointers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"tokens": (2, 6, 7, 256), "memory": (2, 3, 6, 7, 64), "pointers": (2, 8, 64)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


if __name__ == "__main__":
    for heads in (1, 4):
        print(f"{heads} heads of {256 // heads} channels")
        report(Before(heads), After(heads), inputs)
