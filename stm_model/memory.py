"""Which frames are remembered, and their keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange
from torch import Tensor

from stm_kernels import PagedMemory
from stm_model.network import as_positions


@dataclass(frozen=True)
class MemoryRule:
    """Which past frames a frame is segmented from.

    Source: Oh et al. 2019, figure 7, and the released code's fixed number of frames.
    """

    kept: frozenset[int] | int | None
    """Frames kept for good besides the first: every so many (a number), the named ones (a set), or none."""
    first: bool
    """Whether frames with a given mask are kept for good."""
    previous: bool
    """Whether the frame before the current one is in memory while the current one is read."""

    def __post_init__(self) -> None:
        if not (self.first or self.previous):
            raise ValueError("memory: expected a rule that remembers the first or the previous frame, got neither")

    @classmethod
    def parse(cls, text: str, frame_count: int | None = None) -> MemoryRule:
        """Read a rule from its name.

        Args:
            text: `first`, `previous`, `first+previous`, `every:N` (first, previous and every Nth frame) or
                `uniform:K` (first, previous and K frames spread evenly over the video).
            frame_count: the number of frames of the video; only `uniform:K` needs it.

        Raises:
            ValueError: the text is no rule, or `uniform:K` does not know the number of frames.
        """
        if text in ("first", "previous", "first+previous"):
            return cls(None, "first" in text, "previous" in text)
        name, _, number = text.partition(":")
        if name not in ("every", "uniform") or not number.isdecimal() or int(number) < 1:
            raise ValueError(
                f"memory: expected first, previous, first+previous, every:N or uniform:K (N, K ≥ 1), got {text!r}"
            )
        if name == "every":
            return cls(int(number), True, True)
        if frame_count is None:
            raise ValueError(f"memory: {text} needs the number of frames; give frame_count, or use every:N")
        grid = np.round(np.linspace(0, frame_count, int(number) + 2)[:-1]).astype(int)
        return cls(frozenset(grid.tolist()), True, True)

    def keeps(self, frame_index: int, mask_given: bool) -> bool:
        """Whether a frame stays in memory for good; `mask_given` if the user gave the mask."""
        if mask_given and self.first:
            return True
        if isinstance(self.kept, int):
            return frame_index % self.kept == 0
        return self.kept is not None and frame_index in self.kept


class SpaceTimeMemory:
    """Keys and values of the remembered frames, for objects that entered the video at one frame.

    A frame is appended without touching what is already held. At most one frame, the newest, is temporary.
    """

    def __init__(self, rule: MemoryRule, **read_options: Any):
        """`read_options` are those of `PagedMemory.read`."""
        self.rule, self.read_options = rule, read_options
        self._pages: PagedMemory | None = None
        self._temporary_positions = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._pages.nbytes if self._pages is not None else 0

    def wants(self, frame_index: int, mask_given: bool) -> bool:
        """Whether the next frame is segmented with this one in memory."""
        return self.rule.previous or self.rule.keeps(frame_index, mask_given)

    def remember(self, frame_index: int, mask_given: bool, key: Tensor, value: Tensor) -> None:
        """Add a frame: key `[n, C, h, w]` and value `[n, V, h, w]` of the n objects."""
        key, value = as_positions(key), as_positions(value)
        if self._pages is None:
            self._pages = PagedMemory(len(key), key.shape[-1], value.shape[-1], dtype=value.dtype, device=value.device)
        self._pages.append(key, value)
        if not self.rule.keeps(frame_index, mask_given):
            self._temporary_positions = key.shape[1]

    def forget_temporary(self) -> None:
        """Drop the frame that was only there as the previous one."""
        if self._temporary_positions:
            self._pages.drop(self._temporary_positions)
            self._temporary_positions = 0

    def read(self, query_key: Tensor) -> Tensor:
        """What each of the n objects reads at every position of a frame: `[1, C, h, w]` → `[n, V, h, w]`."""
        height, width = query_key.shape[-2:]
        queries = as_positions(query_key).expand(self._pages.batch, -1, -1)
        readout = self._pages.read(queries, **self.read_options)
        return rearrange(readout, "n (h w) v -> n v h w", h=height, w=width)
