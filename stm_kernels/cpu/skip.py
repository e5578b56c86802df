"""Which blocks of values a read in plain PyTorch leaves out, and what gathers the rest of a matrix."""

from itertools import accumulate, groupby

import torch
from torch import Tensor

from stm_kernels.affinity import SKIP_POSITIONS, SKIP_QUERIES
from stm_kernels.cpu.gemm import Scratch, even_slices

# from this share on, multiplying all positions of a chunk is cheaper than gathering those that weigh something
GATHERED_SHARE = 0.75


class Choice:
    """Which positions a block of queries reads: all but some that weigh no more than `skip` of the sum so far, in all.

    The sum only grows, so what is little of it now is no more of it in the end.
    """

    def __init__(self, skip: float, kept: Tensor, nothing: Tensor) -> None:
        self.skip = skip
        # the rows of this block in the map that `read_operator` returns
        self.kept = kept
        # the weights left out and the weights read, [M, 1]
        self.skipped = self.read = nothing

    @property
    def share(self) -> Tensor:
        """The weight left out `[M]`, of all weights."""
        return (self.skipped / seen(self.skipped + self.read))[:, 0]

    def read_of(self, weights: Tensor, chunk: slice, row_sum: Tensor, shrink: Tensor) -> list[slice]:
        """What to read of a chunk, as slices of its positions.

        Args:
            weights: `[M, N]`, of the positions of the chunk.
            chunk: where in the memory they are; it starts at a multiple of SKIP_POSITIONS.
            row_sum: `[M, 1]`, the sum of all weights so far, these included.
            shrink: `[M, 1]`, what the weights before these are to be multiplied by.
        """
        sums = _sums(weights, SKIP_POSITIONS)
        skipped = self.skipped * shrink
        # as many as fit, those first that weigh least where they weigh most
        order = (sums / seen(row_sum)).amax(0).argsort()
        fits = (sums[:, order].cumsum(1).add_(skipped) <= self.skip * row_sum).all(0)
        kept = torch.empty_like(fits)
        kept[order] = ~fits
        if kept.sum() > GATHERED_SHARE * len(kept):
            kept[:] = True
        self.skipped = skipped + sums[:, ~kept].sum(1, keepdim=True)
        self.read = self.read * shrink + sums[:, kept].sum(1, keepdim=True)
        self.kept[:, cells(chunk, SKIP_POSITIONS)] = kept
        return _runs(kept, SKIP_POSITIONS, weights.shape[1])


def readers(kept: Tensor, chunk: slice, queries: int) -> tuple[list[slice], Tensor]:
    """Which queries read something of a chunk of positions, as slices, and which of its positions these leave out.

    Args:
        kept: `[⌈M / SKIP_QUERIES⌉, ⌈N / SKIP_POSITIONS⌉]`, what was read.
        chunk: of positions; it starts at a multiple of SKIP_POSITIONS.
        queries: M.

    Returns:
        The slices, R queries together, and `[R, N]`, true for positions of the chunk that were not read.
    """
    blocks = kept[:, cells(chunk, SKIP_POSITIONS)].bool()
    reads = blocks.any(1)
    runs = _runs(reads, SKIP_QUERIES, queries)
    left_out = (~blocks[reads]).repeat_interleave(SKIP_QUERIES, 0).repeat_interleave(SKIP_POSITIONS, 1)
    return runs, left_out[: _length(runs), : chunk.stop - chunk.start]


def gathered(
    name: str, matrix: Tensor, dim: int, runs: list[slice] | None, dtype: torch.dtype, scratch: Scratch
) -> Tensor:
    """The matrix in `dtype`, of its rows (`dim` 0) or columns (1) those of `runs`; None is all."""
    if runs is None or _length(runs) == matrix.shape[dim]:
        return scratch.cast(name, matrix, dtype)
    shape = list(matrix.shape)
    shape[dim] = _length(runs)
    part = scratch.take(f"gathered {name}", *shape, dtype)
    start = 0
    for run in runs:
        size = run.stop - run.start
        part.narrow(dim, start, size).copy_(matrix.narrow(dim, run.start, size))
        start += size
    return part


def add_to_rows(total: Tensor, part: Tensor, runs: list[slice]) -> None:
    """Add to the rows of `total` that are in `runs`, which `part` has one after the other."""
    start = 0
    for run in runs:
        stop = start + run.stop - run.start
        total[run] += part[start:stop]
        start = stop


def seen(row_sum: Tensor) -> Tensor:
    """What to divide by: a row that saw nothing has a sum of 0."""
    return row_sum.clamp(min=torch.finfo(row_sum.dtype).tiny)


def cells(part: slice, size: int) -> slice:
    """The cells of `size` that a slice covers."""
    return slice(part.start // size, -(-part.stop // size))


def aligned_slices(length: int, most: int, size: int) -> list[slice]:
    """`even_slices` that start at multiples of `size`."""
    parts = even_slices(-(-length // size), max(1, most // size))
    return [slice(part.start * size, min(part.stop * size, length)) for part in parts]


def _sums(weights: Tensor, size: int) -> Tensor:
    """The sums `[M, ⌈N / size⌉]` of every `size` columns of `[M, N]`."""
    whole = weights.shape[1] // size * size
    parts = [weights[:, :whole].unflatten(1, (-1, size)).sum(2)] if whole else []
    if whole < weights.shape[1]:
        parts.append(weights[:, whole:].sum(1, keepdim=True))
    return torch.cat(parts, 1)


def _runs(flags: Tensor, size: int, length: int) -> list[slice]:
    """What the true ones of cells of `size` cover of `range(length)`, neighbours joined."""
    groups = [(flag, len(list(group))) for flag, group in groupby(flags.tolist())]
    stops = accumulate(count for _, count in groups)
    return [
        slice((stop - count) * size, min(stop * size, length)) for (flag, count), stop in zip(groups, stops) if flag
    ]


def _length(runs: list[slice]) -> int:
    return sum(run.stop - run.start for run in runs)
