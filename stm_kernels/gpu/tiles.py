"""Pieces that the kernels share: strided tiles with ragged edges, and the online softmax."""

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, first_row, row_count, row_stride, first_column, COLUMN_COUNT: tl.constexpr, column_stride,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """A `[ROWS, COLUMNS]` tile of a strided matrix `[row_count, COLUMN_COUNT]`, zeros beyond its edges."""
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    ptrs = ptr + rows[:, None].to(tl.int64) * row_stride + columns[None, :].to(tl.int64) * column_stride
    inside = rows[:, None] < row_count
    if COLUMN_COUNT % COLUMNS != 0:
        inside = inside & (columns[None, :] < COLUMN_COUNT)
    return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def online_softmax(products, row_max, row_sum, scale_log2):
    """Fold a tile of dot products `[M, N]` into the running maximum and sum of exponentials `[M]`.

    The maximum is of the unscaled products, and subtracted before they are scaled: a large logit loses no digit.
    Returns the weights of the tile, the factor that shrinks what was summed before, and the new maximum and sum.
    """
    new_max = tl.maximum(row_max, tl.max(products, 1))
    weights = tl.exp2((products - new_max[:, None]) * scale_log2)
    shrink = tl.exp2((row_max - new_max) * scale_log2)
    return weights, shrink, new_max, row_sum * shrink + tl.sum(weights, 1)
