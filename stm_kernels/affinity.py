"""The definition of an affinity, shared by all implementations."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# with `skip`, the blocks that were read are recorded at this granularity: queries × memory positions
SKIP_QUERIES = 32
SKIP_POSITIONS = 32

# a page size that is a multiple of this holds whole tiles only
PAGE_MULTIPLE = 128


@dataclass(frozen=True)
class Affinity:
    """The weight of a memory position for a query: the softmax of `scale · query_key · memory_key + key_bias`."""

    query_key: Tensor
    """`[B, M, C]`; any strides."""
    memory_key: Tensor
    """`[B, N, C]`, same dtype and device; any strides."""
    scale: float
    """Factor of the dot product."""
    key_bias: Tensor | None = None
    """`[B, N]`, contiguous, in `wide_dtype`; added to a position's logits. -inf hides the position."""
    lengths: Tensor | None = None
    """`[B]`, int32: how many positions each memory has; the rest is padding."""
    may_hide: bool = True
    """Whether the bias may be -inf; the square of an "l2" key is not."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, M and N."""
        return *self.query_key.shape[:2], self.memory_key.shape[1]

    def hidden(self) -> Tensor | None:
        """Flags `[B, N]` of what no query sees: padding, and where the bias is -inf; None where nothing can be."""
        flags = None if self.key_bias is None or not self.may_hide else self.key_bias.isneginf()
        if self.lengths is not None:
            behind = torch.arange(self.memory_key.shape[1], device=self.lengths.device) >= self.lengths[:, None]
            flags = behind if flags is None else flags | behind
        return flags

    def positions(self, item: int) -> int:
        """How many positions the memory of one batch item has."""
        N = self.memory_key.shape[1]
        return N if self.lengths is None else min(max(int(self.lengths[item]), 0), N)

    def of_queries(self, items: slice, queries: slice) -> "Affinity":
        """That of some batch items and some of their queries."""
        bias, lengths = (rows if rows is None else rows[items] for rows in (self.key_bias, self.lengths))
        query_key, memory_key = self.query_key[items, queries], self.memory_key[items]
        return replace(self, query_key=query_key, memory_key=memory_key, key_bias=bias, lengths=lengths)


def block_map_shape(B: int, M: int, N: int, skip: float) -> tuple[int, ...]:
    """The shape of the map of blocks that a read with `skip` has read; of an exact read it is empty."""
    return (B, (M + SKIP_QUERIES - 1) // SKIP_QUERIES, (N + SKIP_POSITIONS - 1) // SKIP_POSITIONS) if skip else (B, 0)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, maxima and biases of a read in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
