"""What Triton's reads visit of a memory on a GPU, counted on a CPU: `python bench/keys.py KEYS --blocks`.

`skip` reads the values of a block of positions if a query of its tile may need them. Which blocks these are follows
from the keys, the tiles and the splits of the launch: they are counted by the kernel's rule, in bfloat16, for GPUs that
need not be here, and for a memory in one part. Counts say nothing of time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import table
from stm_kernels.affinity import Affinity
from stm_kernels.gpu.model import GPUS
from stm_kernels.gpu.top_k import GROUP
from stm_kernels.gpu.tuning import ForwardTiles, forward_splits, forward_tiles, groups_per_chunk
from stm_kernels.operator import flat
from stm_kernels.options import ReadOptions

SKIPS = (1e-3, 1e-2)
TOP_K = (16, 32)
TILE_HEIGHT = 8
"""Rows of a tile: with 64 queries a block is 8 × 8."""
LAUNCHES = {gpu.name: (architecture, gpu.multiprocessors) for architecture, gpu in GPUS.items()}
# a GPU of one multiprocessor cuts nothing
LAUNCHES["in one part"] = ("sm_90", 1)


def affinity_of(query_key: Tensor, memory_key: Tensor, similarity: str) -> Affinity:
    """The affinity of queries `[B, M, C]` and keys `[B, N, C]` as the kernels take it."""
    bias, _, scale, _ = flat(ReadOptions(similarity=similarity), query_key, memory_key)
    return Affinity(query_key, memory_key, scale, bias, may_hide=False)


def visited_blocks(affinity: Affinity, skip: float, tiles: ForwardTiles, positions_per_split: int) -> Tensor:
    """`[B, ⌈M / block_m⌉, ⌈N / block_n⌉]`, true where the kernel reads and multiplies a block of values.

    Each split walks from its newest block on and knows nothing of the others.

    Args:
        affinity: without `lengths`.
        skip, tiles, positions_per_split: as `forward_launch` takes them.
    """
    B, M, N = affinity.sizes
    query_key, memory_key = affinity.query_key.float(), affinity.memory_key.float()
    scale_log2 = affinity.scale * math.log2(math.e)
    visited = torch.zeros(B, -(-M // tiles.block_m), -(-N // tiles.block_n), dtype=torch.bool)
    for start in range(0, N, positions_per_split):
        stop = min(start + positions_per_split, N)
        row_max, row_sum, skipped = query_key.new_full((B, M), -math.inf), torch.zeros(B, M), torch.zeros(B, M)
        for first in reversed(range(start, stop, tiles.block_n)):
            block = slice(first, min(first + tiles.block_n, stop))
            # [B, M, block_n]
            products = query_key @ memory_key[:, block].mT
            if affinity.key_bias is not None:
                products += affinity.key_bias[:, None, block] / affinity.scale
            new_max = torch.maximum(row_max, products.amax(2))
            shrink = torch.exp2((row_max - new_max) * scale_log2)
            sums = torch.exp2((products - new_max[:, :, None]) * scale_log2).sum(2)
            row_max, row_sum, skipped = new_max, row_sum * shrink + sums, skipped * shrink
            needed = skipped + sums > skip * row_sum
            # [B, ⌈M / block_m⌉]
            reads = F.pad(needed, (0, -M % tiles.block_m)).unflatten(1, (-1, tiles.block_m)).any(2)
            visited[:, :, first // tiles.block_n] = reads
            skipped += sums.masked_fill(reads.repeat_interleave(tiles.block_m, 1)[:, :M], 0.0)
    return visited


def gathered_positions(affinity: Affinity, k: int) -> int:
    """How many products of a query and a position the second pass of `top_k` computes, of all queries together.

    Raises:
        ValueError: the memory takes several chunks, of which the later ones gather less.
    """
    B, M, N = affinity.sizes
    if -(-N // GROUP) > groups_per_chunk(B * M):
        raise ValueError(f"affinity: expected at most {groups_per_chunk(B * M) * GROUP} positions, got {N}")
    products = affinity.query_key.float() @ affinity.memory_key.float().mT
    if affinity.key_bias is not None:
        products += affinity.key_bias[:, None] / affinity.scale
    maxima = F.pad(products, (0, -N % GROUP), value=-math.inf).unflatten(2, (-1, GROUP)).amax(3)
    groups = maxima.topk(min(k, maxima.shape[2]), 2).indices
    return int((N - groups * GROUP).clamp(max=GROUP).sum())


def tiled_order(height: int, width: int) -> Tensor:
    """`[H·W]`, the positions of a picture in strips of TILE_HEIGHT rows, each column by column."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    strip, row = y // TILE_HEIGHT, y % TILE_HEIGHT
    return ((strip * width + x) * TILE_HEIGHT + row).flatten().argsort()


def count(tensors: dict[str, Tensor], frames: int) -> dict[str, Any]:
    """The blocks of the newest frames, by GPU, setting and order, and what `top_k` gathers."""
    dtype, size = torch.bfloat16, tensors["size"].tolist()
    query_key, memory_key = tensors["query_key"].to(dtype), tensors["memory_key"].to(dtype)
    M, similarity = query_key.shape[1], "l2" if tensors["is_l2"] else "dot"
    memory_key = memory_key[:, -frames * M :]
    raster, tiled = torch.arange(M), tiled_order(*size)
    tiled_keys = (torch.arange(frames)[:, None] * M + tiled).flatten()
    affinities = {
        name: affinity_of(query_key[:, queries], memory_key[:, keys], similarity)
        for name, queries, keys in (
            ("raster", raster, slice(None)),
            ("tiled queries", tiled, slice(None)),
            ("tiled queries and keys", tiled, tiled_keys),
        )
    }
    (B, _, N), C, V = affinities["raster"].sizes, query_key.shape[2], tensors["memory_value"].shape[2]
    launches = {}
    for name, (architecture, multiprocessors) in LAUNCHES.items():
        tiles = forward_tiles(architecture, dtype, C, V, skips=True, biased=similarity == "l2")
        splits, positions_per_split = forward_splits(tiles, B, M, N, V, multiprocessors)
        visited = {
            f"skip={skip:g}": {
                order: int(visited_blocks(affinity, skip, tiles, positions_per_split).sum())
                for order, affinity in affinities.items()
            }
            for skip in SKIPS
        }
        blocks = B * -(-M // tiles.block_m) * -(-N // tiles.block_n)
        launches[name] = {"tile": [tiles.block_m, tiles.block_n], "splits": splits, "blocks": blocks} | visited
    # a program there is one query: the order changes nothing
    gathered = {f"top_k={k}": gathered_positions(affinities["raster"], k) for k in TOP_K}
    return {"launches": launches, "products": B * M * N, "gathered": gathered}


def shown(frames: int, found: dict[str, Any]) -> str:
    """The counts as a table."""
    rows = [
        (f"{name}, splits: {launch['splits']}, {setting}", launch["blocks"], *launch[setting].values())
        for setting in map("skip={:g}".format, SKIPS)
        for name, launch in found["launches"].items()
    ]
    gathered = [f"{count / found['products']:.4f} of all products by {k}" for k, count in found["gathered"].items()]
    header = (f"{frames} frames", "blocks", "raster", "tiled queries", "tiled queries and keys")
    return f"{table(header, rows)}\ngathered: {', '.join(gathered)}"
