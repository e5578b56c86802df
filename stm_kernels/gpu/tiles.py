"""Pieces that the kernels share: strided tiles with ragged edges, logits, and the online softmax."""

import triton
import triton.language as tl

# a maximum below every product: finite, so that the weights of a row of nothing but -inf are 0
MIN_PRODUCT = tl.constexpr(-1e30)


@triton.jit
def load_tile(ptr, first_row, row_count, row_stride, first_column, COLUMN_COUNT: tl.constexpr, column_stride,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, seen=None):  # fmt: skip
    """A `[ROWS, COLUMNS]` tile of a strided matrix `[row_count, COLUMN_COUNT]`, zeros beyond its edges and in rows that
    are not `seen`.
    """
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    ptrs = ptr + rows[:, None].to(tl.int64) * row_stride + columns[None, :].to(tl.int64) * column_stride
    inside = rows[:, None] < row_count
    if seen is not None:
        inside = inside & seen[:, None]
    if COLUMN_COUNT % COLUMNS != 0:
        inside = inside & (columns[None, :] < COLUMN_COUNT)
    return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def page_of(ptr, pages_ptr, page):
    """The start of a page, by a table of addresses, as a pointer like `ptr`."""
    # pages begin at multiples of 16 bytes, which a loaded address doesn't tell
    return tl.multiple_of(tl.load(pages_ptr + page).to(ptr.dtype), 16)


@triton.jit
def memory_length(lengths_ptr, b, N):
    """How many positions the memory of batch item `b` has."""
    if lengths_ptr is not None:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), N)
    else:
        return N


@triton.jit
def biased(products, key_bias_ptr, first_bias, n, stop):
    """Dot products `[M, N]` plus the bias of their positions `n`, in the same unit, and which positions are seen `[N]`.

    From `stop` on, and where the bias hides a position, products are -inf, whatever its key holds.
    """
    seen = n < stop
    if key_bias_ptr is not None:
        bias = tl.load(key_bias_ptr + first_bias + n, mask=seen, other=float("-inf"))
        products += bias[None, :]
        seen = bias != float("-inf")
    return tl.where(seen[None, :], products, float("-inf")), seen


@triton.jit
def online_softmax(products, row_max, row_sum, scale_log2):
    """Fold a tile of dot products `[M, N]` into the running maximum and sum of exponentials `[M]`.

    The maximum is of the unscaled products, and subtracted before they are scaled: a large logit loses no digit. It
    starts from MIN_PRODUCT.
    Returns the weights of the tile, their sums, the factor that shrinks what was summed before, and the new maximum and
    sum.
    """
    new_max = tl.maximum(row_max, tl.max(products, 1))
    weights = tl.exp2((products - new_max[:, None]) * scale_log2)
    shrink = tl.exp2((row_max - new_max) * scale_log2)
    sums = tl.sum(weights, 1)
    return weights, sums, shrink, new_max, row_sum * shrink + sums


@triton.jit
def store_read(out_ptr, lse_ptr, total, row_max, row_sum, rows, stored, first_v, V: tl.constexpr, scale,
               BLOCK_V: tl.constexpr):  # fmt: skip
    """Write a block `[M, V]` of a read to its `rows`, where `stored`, and beside its first channels the log-sum-exp.

    Returns the sums `[M]` as divisors.
    """
    v = first_v + tl.arange(0, BLOCK_V)
    # a row with no visible key has a sum of 0
    divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
    out = (total / divisor[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * V + v[None, :], out, mask=stored[:, None] & (v[None, :] < V))
    if first_v == 0:
        lse = row_max.to(tl.float64) * scale + tl.log(divisor.to(tl.float64))
        tl.store(lse_ptr + rows, tl.where(row_sum == 0.0, float("-inf"), lse), mask=stored)
    return divisor


@triton.jit
def any_of(flags):
    """Whether any of a vector of flags is true."""
    # a maximum of a vector that comes from a product makes Triton 3.6 fail for sm_100; a histogram does not
    counts = tl.histogram(flags.to(tl.int32), 2)
    return tl.sum(counts * tl.arange(0, 2), 0) > 0


@triton.jit
def final_weights(products, row_top_ptr, rows, inside, scale_log2):
    """The affinity `[M, N]` of dot products whose log-sum-exp, as an unscaled product in float64, is known by row."""
    row_top = tl.load(row_top_ptr + rows, mask=inside, other=0.0)
    # in two parts: a rounding of it would tilt the whole row
    rounded = row_top.to(tl.float32)
    rest = (row_top - rounded).to(tl.float32)
    return tl.exp2((products - rounded[:, None] - rest[:, None]) * scale_log2)
