"""The read: one program keeps a block of queries and a slice of value channels, and walks over a part of the memory."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stm_kernels.affinity import SKIP_POSITIONS, SKIP_QUERIES, Affinity, block_map_shape
from stm_kernels.gpu.affinity import affinity_launch, chunk_of, product, row_top_of, visible
from stm_kernels.gpu.launch import (
    Launch,
    affinity_arguments,
    architecture_of,
    multiprocessors,
    refuse_interpreted_bfloat16,
    strides,
)
from stm_kernels.gpu.merge import triton_merge
from stm_kernels.gpu.tiles import (
    MIN_PRODUCT,
    any_of,
    biased,
    load_tile,
    memory_length,
    online_softmax,
    page_of,
    store_read,
)
from stm_kernels.gpu.tma import descriptor_launch, has_descriptors
from stm_kernels.gpu.tuning import (
    ForwardTiles,
    affinity_tiles,
    forward_splits,
    forward_tiles,
    keys_per_chunk,
    padded,
    staged_is_cheaper,
)

# the smallest block of a tensor core
MIN_CHANNELS = 16


@dataclass(frozen=True)
class PageTable:
    """The addresses of the pages of a memory."""

    keys: Tensor
    """`[pages]` int64, address of each page's keys `[B, page_size, C]`, a multiple of 16."""
    values: Tensor
    """`[pages]` int64, address of each page's values `[B, page_size, V]`, a multiple of 16."""
    page_size: int
    """Positions of a page, a multiple of `PAGE_MULTIPLE`: a tile lies in one page."""
    length: int
    """Positions of all pages; only the last page may be less than full."""


@triton.jit
def note_block(kept_ptr, reads, b, first_m, M, first_n, N, SKIP_QUERIES: tl.constexpr, SKIP_POSITIONS: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Record whether the values of a block `[BLOCK_M, BLOCK_N]` are read."""
    rows, columns = tl.cdiv(M, SKIP_QUERIES), tl.cdiv(N, SKIP_POSITIONS)
    row = first_m // SKIP_QUERIES + tl.arange(0, BLOCK_M // SKIP_QUERIES)
    column = first_n // SKIP_POSITIONS + tl.arange(0, BLOCK_N // SKIP_POSITIONS)
    places = (b * rows + row[:, None]) * columns + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(kept_ptr + places, tl.full(places.shape, 1, tl.uint8) * reads.to(tl.uint8), mask=inside)


@triton.jit
def read_kernel(
    query_key_ptr, memory_key_ptr, memory_value_ptr, key_bias_ptr, lengths_ptr, key_pages_ptr, value_pages_ptr,
    out_ptr, lse_ptr, skipped_ptr, kept_ptr,
    query_key_stride_b, query_key_stride_m, query_key_stride_c,
    memory_key_stride_b, memory_key_stride_n, memory_key_stride_c, key_bias_stride_b,
    memory_value_stride_b, memory_value_stride_n, memory_value_stride_v,
    B, M, N, page_size, positions_per_split, scale: tl.float64, scale_log2, skip: tl.float32,
    SKIPS: tl.constexpr, MAY_HIDE: tl.constexpr,
    SKIP_QUERIES: tl.constexpr, SKIP_POSITIONS: tl.constexpr, C: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    slices_v = tl.cdiv(V, BLOCK_V)
    blocks_m = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    first_v = program % slices_v * BLOCK_V
    first_m = program // slices_v % blocks_m * BLOCK_M
    b = (program // slices_v // blocks_m).to(tl.int64)
    query_key_ptr += b * query_key_stride_b
    start = tl.program_id(1) * positions_per_split
    stop = tl.minimum(start + positions_per_split, memory_length(lengths_ptr, b, N))
    m = first_m + tl.arange(0, BLOCK_M)

    # [M, C]
    query_key = load_tile(query_key_ptr, first_m, M, query_key_stride_m, 0, C, query_key_stride_c, BLOCK_M, BLOCK_C)
    # [M, V]
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_max = tl.full([BLOCK_M], MIN_PRODUCT, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    skipped = tl.zeros([BLOCK_M], tl.float32)
    first_page, pages = 0, 1
    if key_pages_ptr is not None:
        first_page = start // page_size
        pages = tl.cdiv(tl.maximum(stop, start), page_size) - first_page
    for turn in range(pages):
        # the newest positions have most of the mass: read first, they let more of the others be dropped
        page = first_page + (pages - 1 - turn if SKIPS else turn)
        page_start, page_stop, keys_ptr, values_ptr = 0, N, memory_key_ptr, memory_value_ptr
        if key_pages_ptr is not None:
            page_start, page_stop = page * page_size, (page + 1) * page_size
            keys_ptr = page_of(memory_key_ptr, key_pages_ptr, page)
            values_ptr = page_of(memory_value_ptr, value_pages_ptr, page)
        keys_ptr += b * memory_key_stride_b
        values_ptr += b * memory_value_stride_b
        # where this part of the memory begins and ends within the page
        first_place, last_place = tl.maximum(start - page_start, 0), tl.minimum(stop, page_stop) - page_start
        blocks_n = tl.cdiv(tl.maximum(last_place - first_place, 0), BLOCK_N)
        for block in range(blocks_n):
            place = first_place + (blocks_n - 1 - block if SKIPS else block) * BLOCK_N
            first_n = page_start + place
            # [N, C]
            keys = load_tile(
                keys_ptr, place, last_place, memory_key_stride_n, 0, C, memory_key_stride_c, BLOCK_N, BLOCK_C
            )
            # [M, N]
            products = tl.dot(query_key, tl.trans(keys), input_precision="ieee")
            n = first_n + tl.arange(0, BLOCK_N)
            products, seen = biased(products, key_bias_ptr, b * key_bias_stride_b, n, page_start + last_place)
            weights, sums, shrink, row_max, row_sum = online_softmax(products, row_max, row_sum, scale_log2)
            total *= shrink[:, None]
            reads = True
            if SKIPS:
                skipped *= shrink
                # the sum only grows: the share of the final sum is no larger
                reads = any_of((skipped + sums > skip * row_sum) & (m < M))
                if not reads:
                    skipped += sums
                if first_v == 0:
                    note_block(
                        kept_ptr, reads, b, first_m, M, first_n, N, SKIP_QUERIES, SKIP_POSITIONS, BLOCK_M, BLOCK_N
                    )
            if reads:
                # [N, V]
                values = load_tile(
                    values_ptr, place, last_place, memory_value_stride_n, first_v, V, memory_value_stride_v,
                    BLOCK_N, BLOCK_V, seen if MAY_HIDE else None,
                )  # fmt: skip
                total = tl.dot(weights.to(values.dtype), values, total, input_precision="ieee")

    rows = (split * B + b) * M + m
    kept = store_read(out_ptr, lse_ptr, total, row_max, row_sum - skipped, rows, m < M, first_v, V, scale, BLOCK_V)
    if SKIPS:
        if first_v == 0:
            tl.store(skipped_ptr + rows, skipped / (kept + skipped), mask=m < M)


def forward_launch(
    affinity: Affinity,
    memory_value: Tensor,
    out: Tensor,
    lse: Tensor,
    skipped: Tensor,
    kept: Tensor,
    skip: float,
    tiles: ForwardTiles,
    positions_per_split: int,
    pages: PageTable | None = None,
) -> Launch:
    """The launch that reads S parts of the memory, each of `positions_per_split`, with given tiles.

    With `pages` the keys of `affinity` and `memory_value` are those of any page; all have the same strides.

    `out` `[S, B, M, V]`, `lse` `[S, B, M]` (float64) and `skipped` (float32) are contiguous; the log-sum-exp is that
    of the positions whose values were read. `kept` is as `read_operator` returns it, contiguous, and zeros.
    """
    (B, M, N), C, V = affinity.sizes, affinity.query_key.shape[2], memory_value.shape[2]
    arguments = affinity_arguments(affinity) | {
        "memory_value_ptr": memory_value,
        "out_ptr": out,
        "lse_ptr": lse,
        "skipped_ptr": skipped,
        "kept_ptr": kept,
        **strides("memory_value", memory_value, "bnv"),
        "key_pages_ptr": None if pages is None else pages.keys,
        "value_pages_ptr": None if pages is None else pages.values,
        "B": B,
        "N": N if pages is None else pages.length,
        "page_size": 1 if pages is None else pages.page_size,
        "positions_per_split": positions_per_split,
        "scale": affinity.scale,
        "skip": skip,
        "SKIPS": skip > 0,
        "MAY_HIDE": affinity.key_bias is not None and affinity.may_hide,
        "SKIP_QUERIES": SKIP_QUERIES,
        "SKIP_POSITIONS": SKIP_POSITIONS,
        "V": V,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_C": padded(C),
        "BLOCK_V": tiles.block_v,
    }
    grid = (triton.cdiv(V, tiles.block_v) * triton.cdiv(M, tiles.block_m) * B, out.shape[0])
    return Launch(read_kernel, grid, arguments, tiles.num_warps, tiles.num_stages)


def triton_read(
    affinity: Affinity, memory_value: Tensor, skip: float, pages: PageTable | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read a memory of at least one position; arguments and results as in `chunked_read`, `pages` as above."""
    query_key = affinity.query_key
    refuse_interpreted_bfloat16(query_key)
    (B, M, N), C, V = affinity.sizes, query_key.shape[2], memory_value.shape[2]
    N = N if pages is None else pages.length
    architecture = architecture_of(query_key.device)
    inputs = (query_key, affinity.memory_key, memory_value)
    channel_major = any(tensor.stride(2) != 1 for tensor in inputs)
    if not skip and pages is None and staged_is_cheaper(architecture, query_key.dtype, C, V, channel_major):
        return _staged_read(affinity, memory_value)
    # TMA cannot leave out rows, and a weight of 0 times NaN is NaN
    biased = affinity.key_bias is not None
    may_hide = biased and affinity.may_hide
    all_seen = pages is None and affinity.lengths is None and not may_hide
    form = {"skips": skip > 0, "biased": biased, "may_hide": may_hide, "channel_major": channel_major}
    form |= {"descriptors": all_seen and has_descriptors(*inputs)}
    tiles = forward_tiles(architecture, query_key.dtype, C, V, **form)
    splits, positions_per_split = forward_splits(tiles, B, M, N, V, multiprocessors(query_key.device))
    partial = query_key.dtype if splits == 1 else torch.float32
    out = query_key.new_empty(splits, B, M, V, dtype=partial)
    lse = query_key.new_empty(splits, B, M, dtype=torch.float64)
    skipped = query_key.new_zeros(splits, B, M, dtype=torch.float32)
    kept = query_key.new_zeros(block_map_shape(B, M, N, skip), dtype=torch.uint8)
    if tiles.kind == "portable":
        launch = forward_launch(
            affinity, memory_value, out, lse, skipped, kept, skip, tiles, positions_per_split, pages
        )
    else:
        launch = descriptor_launch(affinity, memory_value, out, lse, tiles, positions_per_split)
    launch.run(query_key.device)
    if skip:
        whole = lse - torch.log1p(-skipped.double())
    out, lse = (out[0], lse[0]) if splits == 1 else triton_merge(out, lse, query_key.dtype)
    if not skip:
        return out, lse, skipped[0], kept
    whole = whole.logsumexp(0)
    skipped = torch.where(lse.isneginf(), 0.0, torch.expm1(lse - whole).abs()).float()
    return out, whole, skipped, kept


def _staged_read(affinity: Affinity, memory_value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The read of many value channels: the affinity once, chunk by chunk, whatever their number.

    A program of `read_kernel` holds a slice of the channels and computes the affinity anew for each slice.
    """
    query_key = affinity.query_key
    (B, M, N), V = affinity.sizes, memory_value.shape[2]
    lse = log_sum_exp(affinity)
    row_top = row_top_of(lse, affinity.scale)
    tiles = affinity_tiles(architecture_of(query_key.device), query_key.dtype, query_key.shape[2])
    size = min(N, keys_per_chunk(B * M))
    scratch = query_key.new_empty(B * M * size)
    out = query_key.new_zeros(B, M, V, dtype=torch.float32)
    for start in range(0, N, size):
        part = chunk_of(affinity, start, size)
        values = visible(memory_value[:, start : start + size], part)
        weights = scratch[: B * M * values.shape[1]].view(B, M, -1)
        affinity_launch(part, row_top, weights, tiles).run(query_key.device)
        out += product(weights, values)
    nothing = query_key.new_zeros(B, 0, dtype=torch.uint8)
    return out.to(query_key.dtype), lse, torch.zeros_like(lse, dtype=torch.float32), nothing


def log_sum_exp(affinity: Affinity) -> Tensor:
    """The log-sum-exp `[B, M]`, float64: that of any read of this affinity, so of one with next to no values."""
    return triton_read(affinity, affinity.memory_key[:, :, :MIN_CHANNELS], 0.0)[1]
