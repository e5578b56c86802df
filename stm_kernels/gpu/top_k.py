"""The choice of the k best memory positions of each query, exact, in three steps per chunk of positions: the maxima of
groups of neighbours, from a matrix product whose result is never held; the k best groups, which hold the k best
positions; and of these groups' positions, computed once more, and the k best so far, the k best.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stm_kernels.affinity import Affinity
from stm_kernels.gpu.affinity import chunk_of
from stm_kernels.gpu.launch import Launch, affinity_arguments, architecture_of, refuse_interpreted_bfloat16
from stm_kernels.gpu.tiles import biased, load_tile, memory_length
from stm_kernels.gpu.tuning import GroupTiles, group_tiles, groups_per_chunk, padded, select_tiles

# positions of which the first pass keeps one maximum
GROUP = 16


@triton.jit
def group_max_kernel(
    query_key_ptr, memory_key_ptr, key_bias_ptr, lengths_ptr, maxima_ptr,
    query_key_stride_b, query_key_stride_m, query_key_stride_c,
    memory_key_stride_b, memory_key_stride_n, memory_key_stride_c, key_bias_stride_b,
    M, N, positions_per_program,
    GROUP: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program keeps a block of queries and walks over a part of the positions."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    parts = tl.cdiv(N, positions_per_program)
    groups = tl.cdiv(N, GROUP)
    program = tl.program_id(0)
    first_m = program % blocks_m * BLOCK_M
    start = program // blocks_m % parts * positions_per_program
    b = (program // blocks_m // parts).to(tl.int64)
    query_key_ptr += b * query_key_stride_b
    memory_key_ptr += b * memory_key_stride_b
    stop = memory_length(lengths_ptr, b, N)
    m = first_m + tl.arange(0, BLOCK_M)
    rows = b * M + m
    # [M, C]
    queries = load_tile(query_key_ptr, first_m, M, query_key_stride_m, 0, C, query_key_stride_c, BLOCK_M, BLOCK_C)
    for first_n in range(start, tl.minimum(start + positions_per_program, N), BLOCK_N):
        # [N, C]
        keys = load_tile(
            memory_key_ptr, first_n, stop, memory_key_stride_n, 0, C, memory_key_stride_c, BLOCK_N, BLOCK_C
        )
        # [M, N]
        products = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        products, _ = biased(products, key_bias_ptr, b * key_bias_stride_b, first_n + tl.arange(0, BLOCK_N), stop)
        # NaN counts as the greatest, as in a sort; tl.max would ignore it
        products = tl.where(products != products, float("inf"), products)
        maxima = tl.max(tl.reshape(products, [BLOCK_M, BLOCK_N // GROUP, GROUP]), 2)
        group = first_n // GROUP + tl.arange(0, BLOCK_N // GROUP)
        places = rows[:, None] * groups + group[None, :]
        tl.store(maxima_ptr + places, maxima, mask=(m[:, None] < M) & (group[None, :] < groups))


@triton.jit
def group_products_kernel(
    query_key_ptr, memory_key_ptr, key_bias_ptr, lengths_ptr,
    groups_ptr, maxima_ptr, least_ptr, products_ptr, positions_ptr,
    query_key_stride_b, query_key_stride_m, query_key_stride_c,
    memory_key_stride_b, memory_key_stride_n, memory_key_stride_c, key_bias_stride_b, row_stride,
    M, N, chosen, first_position,
    GROUP: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program computes the products of one query with all positions of its chosen groups."""
    row = tl.program_id(0).to(tl.int64)
    b, m = row // M, row % M
    stop = memory_length(lengths_ptr, b, N)
    memory_key_ptr += b * memory_key_stride_b
    c = tl.arange(0, BLOCK_C)
    query = tl.load(
        query_key_ptr + b * query_key_stride_b + m * query_key_stride_m + c.to(tl.int64) * query_key_stride_c,
        mask=c < C, other=0.0,
    ).to(tl.float32)  # fmt: skip
    for first in range(0, chosen * GROUP, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        inside = place < chosen * GROUP
        group = row * chosen + place // GROUP
        n = tl.load(groups_ptr + group, mask=inside, other=0) * GROUP + place % GROUP
        seen = inside & (n < stop)
        if least_ptr is not None:
            # a group without anything better than the k best so far, which win a tie, is not worth its keys
            seen = seen & (tl.load(maxima_ptr + group, mask=inside, other=0.0) > tl.load(least_ptr + row))
        # [N, C]
        keys = tl.load(
            memory_key_ptr + n[:, None].to(tl.int64) * memory_key_stride_n
            + c[None, :].to(tl.int64) * memory_key_stride_c,
            mask=seen[:, None] & (c[None, :] < C), other=0.0,
        )  # fmt: skip
        products = tl.sum(keys.to(tl.float32) * query[None, :], 1)
        if key_bias_ptr is not None:
            bias = tl.load(key_bias_ptr + b * key_bias_stride_b + n, mask=seen, other=0.0)
            products += bias
            seen = seen & (bias != float("-inf"))
        tl.store(products_ptr + row * row_stride + place, tl.where(seen, products, float("-inf")), mask=inside)
        tl.store(positions_ptr + row * row_stride + place, first_position + n, mask=inside)


@triton.jit
def _ordered(values_ptr, rows, row_count, row_stride, first, width, BLOCK: tl.constexpr):
    """A tile of values as whole numbers in the order of a sort: -inf … inf, NaN; 0 beyond the edges."""
    columns = first + tl.arange(0, BLOCK)
    inside = (rows[:, None] < row_count) & (columns[None, :] < width)
    values = tl.load(values_ptr + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)
    # -0 equals 0
    bits = tl.where(values == 0.0, 0.0, values).to(tl.uint32, bitcast=True)
    order = tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    order = tl.where(values != values, 0xFFFFFFFF, order)
    return tl.where(inside, order, 0), values, inside


@triton.jit
def select_kernel(
    values_ptr, positions_ptr, best_ptr, chosen_ptr, row_count, width, row_stride, k,
    ONE_TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program finds the k greatest of each of its rows, of equal ones the first, and writes them in their order."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if ONE_TILE:
        order, _, _ = _ordered(values_ptr, rows, row_count, row_stride, 0, width, BLOCK)
    # the greatest number that k of a row reach, bit by bit from the highest
    threshold = tl.zeros([BLOCK_ROWS], tl.uint32)
    reach = tl.zeros([BLOCK_ROWS], tl.int32) + width
    bit = tl.full([BLOCK_ROWS], 0x80000000, tl.uint32)
    bits = 32
    undecided = width > k
    while undecided & (bits > 0):
        trial = threshold | bit
        if ONE_TILE:
            reached = tl.sum((order >= trial[:, None]).to(tl.int32), 1)
        else:
            reached = tl.zeros([BLOCK_ROWS], tl.int32)
            for first in range(0, width, BLOCK):
                tile, _, _ = _ordered(values_ptr, rows, row_count, row_stride, first, width, BLOCK)
                reached += tl.sum((tile >= trial[:, None]).to(tl.int32), 1)
        threshold = tl.where(reached >= k, trial, threshold)
        reach = tl.where(reached >= k, reached, reach)
        undecided = tl.max(((reach != k) & (rows < row_count)).to(tl.int32), 0) > 0
        bit = bit >> 1
        bits -= 1
    above = tl.zeros([BLOCK_ROWS], tl.int32)
    for first in range(0, width, BLOCK):
        tile, _, _ = _ordered(values_ptr, rows, row_count, row_stride, first, width, BLOCK)
        above += tl.sum((tile > threshold[:, None]).to(tl.int32), 1)
    equal_before = tl.zeros([BLOCK_ROWS], tl.int32)
    done = tl.zeros([BLOCK_ROWS], tl.int32)
    for first in range(0, width, BLOCK):
        tile, values, inside = _ordered(values_ptr, rows, row_count, row_stride, first, width, BLOCK)
        equal = (tile == threshold[:, None]).to(tl.int32)
        rank = equal_before[:, None] + tl.cumsum(equal, 1)
        taken = inside & ((tile > threshold[:, None]) | ((equal == 1) & (rank <= (k - above)[:, None])))
        place = done[:, None] + tl.cumsum(taken.to(tl.int32), 1) - 1
        positions = first + tl.arange(0, BLOCK)[None, :] + tl.zeros([BLOCK_ROWS, 1], tl.int32)
        if positions_ptr is not None:
            positions = tl.load(positions_ptr + rows[:, None] * row_stride + positions, mask=taken, other=0)
        tl.store(best_ptr + rows[:, None] * k + place, values, mask=taken)
        tl.store(chosen_ptr + rows[:, None] * k + place, positions, mask=taken)
        equal_before += tl.sum(equal, 1)
        done += tl.sum(taken.to(tl.int32), 1)


def group_max_launch(affinity: Affinity, maxima: Tensor, tiles: GroupTiles) -> Launch:
    """The launch that fills `maxima` `[B, M, ⌈N / GROUP⌉]`, float32, contiguous, by the greatest product of a group."""
    B, M, N = affinity.sizes
    arguments = affinity_arguments(affinity) | {
        "maxima_ptr": maxima,
        "positions_per_program": tiles.positions,
        "GROUP": GROUP,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_C": padded(affinity.query_key.shape[2]),
    }
    del arguments["scale"], arguments["scale_log2"]
    grid = (triton.cdiv(M, tiles.block_m) * triton.cdiv(N, tiles.positions) * B,)
    return Launch(group_max_kernel, grid, arguments, tiles.num_warps, tiles.num_stages)


def group_products_launch(
    affinity: Affinity,
    groups: Tensor,
    maxima: Tensor,
    least: Tensor | None,
    first_position: int,
    products: Tensor,
    positions: Tensor,
    tiles: GroupTiles,
) -> Launch:
    """The launch that fills `products`, float32, and `positions`, int32, of chosen groups.

    Args:
        affinity: of a chunk, by `chunk_of`.
        groups: `[B · M, G]`, int32, contiguous: the chosen ones.
        maxima: `[B · M, G]`, float32, contiguous: theirs.
        least: `[B · M]`, float32: groups whose maximum is not above it count as -inf; None reads all.
        first_position: where the chunk starts.
        products, positions: `[B · M, G · GROUP]`, the same stride for both, rows contiguous.
        tiles: of a program.
    """
    B, M, _ = affinity.sizes
    arguments = affinity_arguments(affinity) | {
        "groups_ptr": groups,
        "maxima_ptr": maxima,
        "least_ptr": least,
        "products_ptr": products,
        "positions_ptr": positions,
        "row_stride": products.stride(0),
        "chosen": groups.shape[1],
        "first_position": first_position,
        "GROUP": GROUP,
        "BLOCK_N": tiles.gathered,
        "BLOCK_C": padded(affinity.query_key.shape[2]),
    }
    del arguments["scale"], arguments["scale_log2"]
    return Launch(group_products_kernel, (B * M,), arguments, tiles.gather_warps, 1)


def select_launch(values: Tensor, positions: Tensor | None, best: Tensor, chosen: Tensor, architecture: str) -> Launch:
    """The launch that fills `best` and `chosen` `[R, k]`, contiguous, by the k greatest of `values` `[R, W]` and their
    `positions`, of the same strides; without them by their columns. Rows are contiguous; k is no more than W.
    """
    tiles = select_tiles(architecture, values.shape[1])
    arguments = {
        "values_ptr": values,
        "positions_ptr": positions,
        "best_ptr": best,
        "chosen_ptr": chosen,
        "row_count": values.shape[0],
        "width": values.shape[1],
        "row_stride": values.stride(0),
        "k": best.shape[1],
        "ONE_TILE": values.shape[1] <= tiles.block,
        "BLOCK_ROWS": tiles.block_rows,
        "BLOCK": tiles.block,
    }
    return Launch(select_kernel, (triton.cdiv(len(values), tiles.block_rows),), arguments, tiles.num_warps, 1)


def triton_select(affinity: Affinity, k: int) -> tuple[Tensor, Tensor]:
    """Select as `stm_kernels.cpu.top_k.Select` has it, in the order of the positions."""
    query_key, device = affinity.query_key, affinity.query_key.device
    refuse_interpreted_bfloat16(query_key)
    (B, M, N), architecture = affinity.sizes, architecture_of(device)
    rows, k = B * M, min(k, N)
    tiles = group_tiles(architecture, query_key.dtype, query_key.shape[2])
    size = min(triton.cdiv(N, GROUP), groups_per_chunk(rows)) * GROUP
    most = min(k, size // GROUP)

    def empty(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return query_key.new_empty(rows, columns, dtype=dtype)

    def select(values: Tensor, positions: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        best, chosen = empty(count), empty(count, torch.int32)
        select_launch(values, positions, best, chosen, architecture).run(device)
        return best, chosen

    products, positions = empty(k + most * GROUP), empty(k + most * GROUP, torch.int32)
    best, chosen = empty(0), empty(0, torch.int32)
    for start in range(0, N, size):
        part = chunk_of(affinity, start, size)
        maxima = empty(triton.cdiv(part.memory_key.shape[1], GROUP))
        group_max_launch(part, maxima, tiles).run(device)
        maxima, groups = select(maxima, None, min(k, maxima.shape[1]))
        # the k best so far stand first: they win a tie
        held = best.shape[1]
        products[:, :held], positions[:, :held] = best, chosen
        width = held + groups.shape[1] * GROUP
        least = best.amin(1) if held == k else None
        candidates = slice(held, width)
        group_products_launch(
            part, groups, maxima, least, start, products[:, candidates], positions[:, candidates], tiles
        ).run(device)
        best, chosen = select(products[:, :width], positions[:, :width], min(k, width))
    if affinity.lengths is not None:
        ends = affinity.lengths.repeat_interleave(M)
        chosen.masked_fill_(chosen >= ends[:, None], 0)
    return chosen.view(B, M, k), best.mul_(affinity.scale).view(B, M, k)
