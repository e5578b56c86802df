"""A clip: the unit that datasets yield and training consumes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Clip(NamedTuple):
    """A few frames with the labels of their objects."""

    frames: Tensor
    """`[T, 3, H, W]` float32 RGB in 0…1."""
    labels: Tensor
    """`[T, H, W]` uint8; 0 is background, 1…n are objects."""

    @property
    def objects(self) -> int:
        """n, the objects visible in the first frame."""
        return int(self.labels[0].max())
