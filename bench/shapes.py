"""The sizes that reads are measured at, what they cost at least, and what they may take of a memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Size:
    """A read of `B` objects: a frame of `M` positions asks a memory of `T` such frames."""

    M: int
    """Positions of a frame."""
    T: int
    """Frames in the memory."""
    B: int = 1
    """Objects, each with keys of its own."""
    C: int = 128
    """Key channels."""
    V: int = 512
    """Value channels."""

    @property
    def N(self) -> int:
        """Memory positions."""
        return self.M * self.T

    def __str__(self) -> str:
        return f"M={self.M} T={self.T} B={self.B}"

    def flops(self, direction: str) -> float:
        """The operations that no algorithm can do without: forward two products, backward five."""
        pairs = 2.0 * self.B * self.M * self.N
        forward = pairs * (self.C + self.V)
        return forward if direction == "forward" else forward + pairs * (3 * self.C + 2 * self.V)

    def input_bytes(self, dtype: torch.dtype) -> int:
        """Of query keys, memory keys, memory values and one result."""
        return self.B * (self.M + self.N) * (self.C + self.V) * dtype.itemsize

    def needed_bytes(self, dtype: torch.dtype, direction: str, holds_affinity: bool) -> int:
        """An upper guess of what a measurement takes: inputs and gradients, copies of them, the check, the affinity."""
        tensors = self.input_bytes(dtype) * (3 if direction == "forward" else 6)
        check = 2**32 if self.V >= 128 else 0
        affinities = 3 if direction == "forward" else 6
        return tensors + check + (affinities * self.B * self.M * self.N * dtype.itemsize if holds_affinity else 0)


MOST_IMPORTANT = (Size(1620, 20), Size(1620, 1000), Size(576, 5))
FRAMES = (576, 1620, 3600, 8160)
MEMORIES = (1, 5, 20, 100, 1000)


def sizes(tiny: bool, quick: bool) -> list[Size]:
    """All sizes, the most important first; `tiny` proves the program where there is no GPU."""
    if tiny:
        return [Size(40, 2, 1, 16, 32), Size(33, 3, 2, 16, 32)]
    if quick:
        return list(MOST_IMPORTANT)
    rest = [Size(M, T, B) for B in (1, 2) for M in (1620, 576, 3600, 8160) for T in MEMORIES]
    # the cheap before the dear, so that a short budget ends with few gaps
    rest.sort(key=lambda size: (size.B, size.flops("forward")))
    return list(dict.fromkeys([*MOST_IMPORTANT, *rest]))
