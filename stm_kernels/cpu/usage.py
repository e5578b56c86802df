"""The column sums of the affinity: by a pass of their own, or with the read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stm_kernels.affinity import Affinity, wide_dtype
from stm_kernels.cpu.chunked import (
    KEYS_PER_CHUNK,
    QUERIES_PER_BLOCK,
    Weights,
    chunked_read,
    chunks_of,
    final_weights,
    read_block,
    row_top_parts,
)
from stm_kernels.cpu.gemm import Scratch, key_products, product_dtype, steady_slices
from stm_kernels.cpu.threads import MIN_QUERIES, Block, blocks_of, side_by_side, threads_of

HELD_WEIGHTS = 2**23
"""Weights of a block of queries that are held until their sums are known."""


def chunked_read_with_usage(
    affinities: Sequence[Affinity], values: Sequence[Tensor], weight: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Read the pages of a memory as one, and how much of the softmax mass each position has, in one pass.

    The weights of some queries are held for all positions; once their sums are known they are added up by position.

    Args:
        affinities: of the same queries with the keys of each page, at least one position; nothing is hidden.
        values: of each page, `[B, P, V]`.
        weight: `[B, M]`, what each query counts in the usage; None is 1.

    Returns:
        The read `[B, M, V]`, its log-sum-exp `[B, M]`, float64, and the usage `[B, P]` of each page in `wide_dtype`; in
        bfloat16 it is that of the rounded weights, by which the values are multiplied too.
    """
    first = affinities[0]
    query_key, scale = first.query_key, first.scale
    (B, M, _), V, wide = first.sizes, values[0].shape[2], wide_dtype(query_key.dtype)
    out, lse = query_key.new_empty(B, M, V), query_key.new_empty(B, M, dtype=torch.float64)
    lengths = [affinity.sizes[2] for affinity in affinities]
    # powers of two: oneDNN compiles a product for every number of rows, and a memory grows
    rows, most = MIN_QUERIES, HELD_WEIGHTS // threads_of(query_key.device) // sum(lengths)
    while 2 * rows <= min(QUERIES_PER_BLOCK, most):
        rows *= 2
    chunks = [[chunk for page in zip(affinities, values) for chunk in chunks_of(*page, item)] for item in range(B)]

    def read(blocks: Sequence[Block], scratch: Scratch) -> Tensor:
        usage = query_key.new_zeros(B, sum(lengths), dtype=wide)
        for item, block in blocks:
            held: list[Weights] = []
            found, total = read_block(query_key[item, block], chunks[item], V, scale, scratch, held)
            out[item, block], lse[item, block] = found, total
            sums = usage[item].split([len(keys) for keys, _, _ in chunks[item]])
            for (weights, row_max), part in zip(held, sums):
                shares = (row_max[:, 0].double() * scale - total).exp_()
                if weight is not None:
                    shares *= weight[item, block]
                _add_column_sums(part, weights, shares.to(wide))
        return usage

    blocks = blocks_of(B, M, rows, query_key.device)
    usage = sum(side_by_side(read, blocks, query_key.device), query_key.new_zeros((), dtype=wide))
    return out, lse, [*usage.split(lengths, 1)]


def _add_column_sums(total: Tensor, weights: Tensor, shares: Tensor) -> None:
    """`total += weightsᵀ · shares`; shares of narrow weights are in two parts, rounded and the rounding error."""
    if weights.dtype == shares.dtype:
        total.addmv_(weights.mT, shares)
        return
    rounded = shares.to(weights.dtype)
    parts = torch.stack([rounded, (shares - rounded).to(weights.dtype)])
    total.add_(torch.mm(parts, weights).to(total.dtype).sum(0))


def chunked_usage(affinity: Affinity, lse: Tensor | None) -> Tensor:
    """Column sums `[B, N]` of the affinity, in `wide_dtype`, of a memory of at least one position.

    Args:
        affinity: the weights of the positions.
        lse: `[B, M]`, float64; None computes it.
    """
    query_key, memory_key = affinity.query_key, affinity.memory_key
    B, M, N = affinity.sizes
    wide, narrow = wide_dtype(query_key.dtype), product_dtype(query_key)
    if lse is None:
        lse = chunked_read(affinity, memory_key[:, :, :1])[1]

    def column_sums(blocks: Sequence[Block], scratch: Scratch) -> Tensor:
        usage = query_key.new_zeros(B, N, dtype=wide)
        for item, block in blocks:
            queries = scratch.cast("query_key", query_key[item, block], narrow)
            row_top = row_top_parts(lse[item, block], affinity.scale, wide)
            for chunk in steady_slices(affinity.positions(item), M, KEYS_PER_CHUNK):
                products = key_products(queries, memory_key[item, chunk], wide, scratch)
                if affinity.key_bias is not None:
                    products.add_(affinity.key_bias[item, chunk] / affinity.scale)
                usage[item, chunk] += final_weights(products, row_top, affinity.scale).sum(0)
        return usage

    blocks = blocks_of(B, M, QUERIES_PER_BLOCK, query_key.device)
    return sum(side_by_side(column_sums, blocks, query_key.device), query_key.new_zeros((), dtype=wide))
