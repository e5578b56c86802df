"""Which blocks of values a read in plain PyTorch drops, and gathering the rows or columns that are left."""

from itertools import accumulate, groupby

import torch
from torch import Tensor

from stm_kernels.affinity import SKIP_POSITIONS, SKIP_QUERIES
from stm_kernels.cpu.gemm import Scratch, even_slices

# above this share of kept blocks, a product with the whole chunk is cheaper than gathering the kept positions
GATHERED_SHARE = 0.75


class Choice:
    """Which positions a block of queries reads: keeps blocks until the dropped mass would exceed `skip`.

    The mass is judged against the sum so far, which only grows: its share of the final sum is no larger.

    Args:
        skip: softmax mass that a query may drop.
        kept: `[⌈M / SKIP_QUERIES⌉, ⌈N / SKIP_POSITIONS⌉]`, these queries' rows of the map that `read_operator` returns.
        zeros: `[M, 1]`, in the dtype of the weights.
    """

    def __init__(self, skip: float, kept: Tensor, zeros: Tensor) -> None:
        self.skip, self.kept = skip, kept
        # sums of the dropped weights and of those that were read, [M, 1]
        self.skipped = self.read = zeros

    @property
    def share(self) -> Tensor:
        """The dropped softmax mass `[M]`."""
        return (self.skipped / positive(self.skipped + self.read))[:, 0]

    def read_of(self, weights: Tensor, chunk: slice, row_sum: Tensor, shrink: Tensor) -> list[slice]:
        """Decide what to read of a chunk; returns slices of its positions.

        Args:
            weights: `[M, N]`, the exponentials of the chunk.
            chunk: its place in the memory; it starts at a multiple of SKIP_POSITIONS.
            row_sum: `[M, 1]`, the sum of all weights so far, these included.
            shrink: `[M, 1]`, the factor that rescales earlier weights to the new maximum.
        """
        sums = _sums(weights, SKIP_POSITIONS)
        skipped = self.skipped * shrink
        # dropped are as many blocks as fit, in the order of their largest share of any query
        order = (sums / positive(row_sum)).amax(0).argsort()
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
    """The queries that read some of a chunk of positions.

    Args:
        kept: `[⌈M / SKIP_QUERIES⌉, ⌈N / SKIP_POSITIONS⌉]`, nonzero for blocks that were read.
        chunk: of positions; it starts at a multiple of SKIP_POSITIONS.
        queries: M.

    Returns:
        Slices of R queries in all, and `[R, N]`, true for the positions of the chunk that these dropped.
    """
    blocks = kept[:, cells(chunk, SKIP_POSITIONS)].bool()
    reads = blocks.any(1)
    runs = _runs(reads, SKIP_QUERIES, queries)
    dropped = (~blocks[reads]).repeat_interleave(SKIP_QUERIES, 0).repeat_interleave(SKIP_POSITIONS, 1)
    return runs, dropped[: _length(runs), : chunk.stop - chunk.start]


def gathered(
    name: str, matrix: Tensor, dim: int, runs: list[slice] | None, dtype: torch.dtype, scratch: Scratch
) -> Tensor:
    """The rows (`dim` 0) or columns (`dim` 1) `runs` of a matrix, in `dtype`; None is all."""
    if runs is None or _length(runs) == matrix.shape[dim]:
        return scratch.cast(name, matrix, dtype)
    shape = list(matrix.shape)
    shape[dim] = _length(runs)
    part = scratch.take(f"gathered {name}", shape, dtype)
    start = 0
    for run in runs:
        size = run.stop - run.start
        part.narrow(dim, start, size).copy_(matrix.narrow(dim, run.start, size))
        start += size
    return part


def add_to_rows(total: Tensor, part: Tensor, runs: list[slice]) -> None:
    """Add `part`, whose rows are those of `runs` one after the other, to these rows of `total`."""
    start = 0
    for run in runs:
        stop = start + run.stop - run.start
        total[run] += part[start:stop]
        start = stop


def positive(row_sum: Tensor) -> Tensor:
    """The sum as a divisor: a row with no visible key has a sum of 0."""
    return row_sum.clamp(min=torch.finfo(row_sum.dtype).tiny)


def cells(part: slice, size: int) -> slice:
    """The cells of `size` that a slice covers."""
    return slice(part.start // size, -(-part.stop // size))


def aligned_slices(length: int, longest: int, size: int) -> list[slice]:
    """`even_slices` that start at multiples of `size`."""
    parts = even_slices(-(-length // size), max(1, longest // size))
    return [slice(part.start * size, min(part.stop * size, length)) for part in parts]


def _sums(weights: Tensor, size: int) -> Tensor:
    """The sums `[M, ⌈N / size⌉]` of every `size` columns of `[M, N]`."""
    whole = weights.shape[1] // size * size
    parts = [weights[:, :whole].unflatten(1, (-1, size)).sum(2)] if whole else []
    if whole < weights.shape[1]:
        parts.append(weights[:, whole:].sum(1, keepdim=True))
    return torch.cat(parts, 1)


def _runs(flags: Tensor, size: int, length: int) -> list[slice]:
    """The parts of `range(length)` whose cells of `size` are true, neighbours joined."""
    groups = [(flag, len(list(group))) for flag, group in groupby(flags.tolist())]
    stops = accumulate(count for _, count in groups)
    return [
        slice((stop - count) * size, min(stop * size, length)) for (flag, count), stop in zip(groups, stops) if flag
    ]


def _length(runs: list[slice]) -> int:
    return sum(run.stop - run.start for run in runs)
