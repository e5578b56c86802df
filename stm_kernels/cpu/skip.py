"""The read that drops positions of next to no weight: all keys are multiplied, the values of few are gathered.

A position that weighs less than `skip / N` is dropped: N of them weigh less than `skip`. Where the affinity is not
peaked the others are too many to gather, and nothing is dropped.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stm_kernels.affinity import Affinity, wide_dtype
from stm_kernels.cpu.chunked import LOG2_E, MIN_ROW_MAX, chunked_read, power_of_two
from stm_kernels.cpu.gemm import Scratch, key_products, product_dtype, steady_slices
from stm_kernels.cpu.threads import Block, blocks_of, side_by_side
from stm_kernels.cpu.top_k import contiguous_parts

# [key chunk × query block] buffers of 2 MiB stay in the second- and third-level caches
QUERIES_PER_BLOCK = 544
PRODUCTS = 2**19
MAX_KEYS_PER_CHUNK = 2048
# of so many neighbouring positions only the greatest logit is looked at first
GROUP = 8
# a group that is gathered takes about as long as its product with so many channels of values; and so many are gathered
# at most, as a share of all
GATHERED_CHANNELS = 2048
MAX_GATHERED = 1 / 8
# so many queries, from everywhere, show whether it pays; not asked where all takes a few milliseconds
PROBED = 48
MIN_MULTIPLICATIONS = 2**29


class Bag(NamedTuple):
    """What m queries read: K positions in all, one query after the other."""

    positions: Tensor
    """`[K]`"""
    weights: Tensor
    """`[K]`, those of a query sum to 1."""
    counts: Tensor
    """`[m]`, how many positions each query reads."""
    lse: Tensor
    """`[m]`, float64, of all positions, dropped or not."""
    skipped: Tensor
    """`[m]`, the dropped mass."""


def skipping_read(affinity: Affinity, memory_value: Tensor, skip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Read a memory of at least one position; arguments and results as in `chunked_read`.

    Args:
        affinity, memory_value: as in `chunked_read`.
        skip: softmax mass that a query may drop, in (0, 1).
    """
    query_key, memory_key, key_bias = affinity.query_key, affinity.memory_key, affinity.key_bias
    (B, M, N), V = affinity.sizes, memory_value.shape[2]
    share = min(V / GATHERED_CHANNELS, MAX_GATHERED)

    def heaviest(item: int, queries: slice, share: float, scratch: Scratch) -> Bag | None:
        length = affinity.positions(item)
        bias = None if key_bias is None else key_bias[item, :length] / affinity.scale
        memory = (memory_key[item, :length], bias)
        return _heaviest(query_key[item, queries], memory, affinity.scale, skip, share, M, scratch)

    some = slice(None, None, -(-M // PROBED))
    pays = [
        M * N * V >= MIN_MULTIPLICATIONS and heaviest(item, some, share, Scratch(query_key.device)) is not None
        for item in range(B)
    ]
    if not any(pays):
        return chunked_read(affinity, memory_value)
    out = query_key.new_empty(B, M, V)
    lse = query_key.new_empty(B, M, dtype=torch.float64)
    skipped = query_key.new_zeros(B, M, dtype=torch.float32)
    blocks = [(item, block) for item, block in blocks_of(B, M, QUERIES_PER_BLOCK, query_key.device) if pays[item]]
    found: dict[tuple[int, int], Bag | None] = {}

    def gather(blocks: Sequence[Block], scratch: Scratch) -> None:
        for item, block in blocks:
            found[item, block.start] = heaviest(item, block, 2 * share, scratch)

    side_by_side(gather, blocks, query_key.device)
    for item in range(B):
        bags, done = [], 0
        for block in (block for place, block in blocks if place == item):
            if (bag := found[item, block.start]) is None:
                break
            bags.append(bag[:3])
            lse[item, block], skipped[item, block] = bag[3:]
            done = block.stop
        if bags:
            positions, weights, counts = map(torch.cat, zip(*bags))
            starts, weights = counts.cumsum(0) - counts, weights.to(memory_value.dtype)
            for channels, table in contiguous_parts(memory_value[item]):
                read = F.embedding_bag(positions, table, starts, mode="sum", per_sample_weights=weights)
                out[item, :done, channels] = read
        if done < M:
            one, rest = slice(item, item + 1), slice(done, M)
            read, sums, _ = chunked_read(affinity.of_queries(one, rest), memory_value[one])
            out[one, rest], lse[one, rest] = read, sums
    return out, lse, skipped


def _heaviest(
    query_key: Tensor,
    memory: tuple[Tensor, Tensor | None],
    scale: float,
    skip: float,
    share: float,
    frame: int,
    scratch: Scratch,
) -> Bag | None:
    """What m queries of one batch item read.

    Args:
        query_key: `[m, C]`.
        memory: keys `[N, C]` and their bias `[N]`, which is added to the unscaled products.
        scale, skip: of the read.
        share: of all groups of positions the most to gather; None where there would be more.
        frame: positions of a frame.
        scratch: buffers.
    """
    memory_key, bias = memory
    (m, _), N, wide = query_key.shape, len(memory_key), wide_dtype(query_key.dtype)
    queries = scratch.cast("queries", query_key, product_dtype(query_key))
    # what is further below the maximum weighs less, in all, than the rounding of a sum
    reach = math.log(max(N, 1) / torch.finfo(wide).eps) / scale
    top = queries.new_full((m,), MIN_ROW_MAX, dtype=wide)
    nothing = torch.empty(0, dtype=torch.int64, device=queries.device)
    gathered = [(nothing, nothing, top.new_empty(0, GROUP))]
    count, most = 0, share * m * N / GROUP
    # the newest positions have most of the mass: looked at first, they show that others have none
    longest = max(GROUP, min(MAX_KEYS_PER_CHUNK, PRODUCTS // m))
    for chunk in steady_slices(N, frame, longest)[::-1]:
        products = _products(memory_key[chunk], queries, wide, scratch)
        if bias is not None:
            products[: chunk.stop - chunk.start] += bias[chunk, None]
        groups = products.unflatten(0, (-1, GROUP))
        maxima = groups.amax(1)
        top = torch.maximum(top, maxima.amax(0))
        group, query = (maxima >= top - reach).nonzero(as_tuple=True)
        count += len(group)
        # NaN must show in the read, as it does where nothing is dropped
        if count > most or not top.isfinite().all():
            return None
        gathered.append((query, group * GROUP + chunk.start, groups.mT[group, query]))
    query, first, weights = map(torch.cat, zip(*gathered))
    gathered.clear()
    power_of_two(weights.sub_(top[query, None]).mul_(scale * LOG2_E))
    row_sum = top.new_zeros(m).index_add_(0, query, weights.sum(1))
    heavy = weights >= (skip / max(N, 1) * row_sum)[query, None]
    group, place = heavy.nonzero(as_tuple=True)
    positions, read = first[group] + place, weights[group, place]
    dropped = top.new_zeros(m).index_add_(0, query, weights.masked_fill_(heavy, 0.0).sum(1))
    query, order = query[group].sort(stable=True)
    read = read[order]
    read_sum = top.new_zeros(m).index_add_(0, query, read)
    return Bag(
        positions[order],
        read / read_sum[query],
        query.bincount(minlength=m),
        top.double() * scale + row_sum.double().log(),
        dropped / row_sum.clamp(min=torch.finfo(wide).tiny),
    )


def _products(keys: Tensor, queries: Tensor, wide: torch.dtype, scratch: Scratch) -> Tensor:
    """`keys · queriesᵀ` in whole groups of rows: those beyond the keys are -inf."""
    P, C = keys.shape
    if P % GROUP or keys.dtype != queries.dtype or not keys.is_contiguous():
        padded = scratch.take("padded keys", (-(-P // GROUP) * GROUP, C), queries.dtype)
        padded[:P], padded[P:] = keys, 0
        keys = padded
    products = key_products(keys, queries, wide, scratch)
    products[P:] = -math.inf
    return products
