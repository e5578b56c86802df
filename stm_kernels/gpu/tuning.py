"""Tile choices: safe defaults by architecture, dtype and channels."""

import math
from dataclasses import dataclass

import torch
import triton

from stm_kernels.gpu.launch import INTERPRETER


@dataclass(frozen=True)
class ForwardTiles:
    """The tile of one forward program."""

    block_m: int
    """Queries."""
    block_n: int
    """Memory positions per loop iteration."""
    block_v: int
    """Value channels; a wider memory is split over the grid."""
    num_warps: int
    """Warps per program."""
    num_stages: int
    """Loop iterations whose loads are in flight."""
    kind: str = "portable"
    """How tiles are loaded: "portable", by pointers; "descriptor", by TMA (sm_90+); "warp-specialized", by TMA in warps
    of their own, beside `num_warps`."""


@dataclass(frozen=True)
class AffinityTiles:
    """The tile of one program that writes a part of the affinity, and of its gradient, out."""

    block_m: int
    """Queries."""
    block_n: int
    """Memory positions."""
    block_k: int
    """Channels per step of a product."""
    num_warps: int
    """Warps per program."""
    num_stages: int
    """Loop iterations whose loads are in flight."""


@dataclass(frozen=True)
class UsageTiles:
    """The tile of one program that sums columns of the affinity."""

    block_m: int
    """Queries per loop iteration."""
    block_n: int
    """Memory positions."""
    num_warps: int
    """Warps per program."""
    num_stages: int
    """Loop iterations whose loads are in flight."""


@dataclass(frozen=True)
class MergeTiles:
    """The tile of one program that merges partial reads."""

    block_rows: int
    """Queries of all batch items."""
    block_v: int
    """Value channels."""
    num_warps: int
    """Warps per program."""


@dataclass(frozen=True)
class GroupTiles:
    """The tiles of the two programs that multiply keys to choose among them."""

    block_m: int
    """Queries of a program that finds the maxima of groups."""
    block_n: int
    """Its memory positions per loop iteration."""
    positions: int
    """Its memory positions in all."""
    num_warps: int
    """Its warps."""
    num_stages: int
    """Its loop iterations whose loads are in flight."""
    gathered: int
    """Memory positions per loop iteration of a program that multiplies one query with chosen groups."""
    gather_warps: int
    """Its warps."""


@dataclass(frozen=True)
class SelectTiles:
    """The tile of one program that selects the greatest of its rows."""

    block_rows: int
    """Rows."""
    block: int
    """Columns held at once; longer rows are read again for each step of the search."""
    num_warps: int
    """Warps per program."""


# 227 KiB of shared memory; every other GPU gets tiles that fit 99 KiB
LARGE_TILES = ("sm_90", "sm_100", "sm_103")
# where tiles are loaded by TMA if their layout allows
TMA_ARCHITECTURES = ("sm_90",)
# 256 registers, and matrix products that take each operand twice, once for each half of a warp
RDNA3 = "gfx11"

# logits written out at once: 2 GPU waves of tiles at M = 1620, and 128 MiB of bfloat16 scratch
WRITTEN_LOGITS = 2**25
MIN_KEYS_PER_CHUNK = 1024

# maxima of groups kept at once: 128 MiB in float32; one selection takes a whole row of them
KEPT_MAXIMA = 2**25
MAX_GROUPS = 8192
MIN_GROUPS = 64

# value slices from which on the affinity is written out: three objects of 512 channels that share their keys, where a
# slice has 256
STAGED_SLICES = 6

# costs of a split, in memory positions that a program reads meanwhile: its start and end, a launch of the merge, and
# the merge's traffic per value
MIN_KEYS_PER_SPLIT = 128
MAX_SPLITS = 64
KEYS_PER_START = 100
KEYS_PER_MERGE = 200
KEYS_PER_MERGED_VALUE = 1e-4


def forward_tiles(
    architecture: str,
    dtype: torch.dtype,
    C: int,
    V: int,
    *,
    skips: bool = False,
    descriptors: bool = False,
    biased: bool = False,
    may_hide: bool = False,
    channel_major: bool = False,
) -> ForwardTiles:
    """Choose the forward tile.

    Args:
        architecture: as `architecture_of` names it.
        dtype: of the inputs.
        C, V: key and value channels.
        skips: whether values may be dropped.
        descriptors: whether the layout of the inputs allows TMA.
        biased: whether there is a bias.
        may_hide: whether it may hide positions, whose rows each load leaves out.
        channel_major: whether the channels of an input do not lie together, for which addresses take more registers.
    """
    block_v = padded(V)
    if architecture == INTERPRETER:
        return ForwardTiles(32, 32, min(64, block_v), 4, 1)
    if architecture.startswith(RDNA3):
        return _rdna3_tiles(dtype, padded(C), block_v, skips)
    if dtype == torch.float32:
        if skips:
            return ForwardTiles(32, 32, min(64, block_v), 16 if architecture in (*LARGE_TILES, "sm_120") else 8, 1)
        return ForwardTiles(16 if channel_major else 32, 32, min(128, block_v), 8, 1)
    if biased and architecture.startswith("gfx"):
        return ForwardTiles(64, 32, min(128 if padded(C) > 128 else 256, block_v), 8, 2)
    if padded(C) > 128:
        return ForwardTiles(64, 32, min(256, block_v), 8, 2)
    form = {"narrow": padded(C) <= 64, "may_hide": may_hide, "channel_major": channel_major}
    if architecture == "sm_80":
        return _ampere_tiles(block_v, skips, biased, **form)
    if architecture == "sm_90":
        kind = "descriptor" if descriptors and not skips else "portable"
        return _hopper_tiles(block_v, skips, biased, kind, **form)
    if architecture in LARGE_TILES and not skips and not biased:
        return ForwardTiles(128, 64, min(256, block_v), 8, 3)
    return ForwardTiles(64, 64, min(256, block_v), 8, 2)


# the best predicted of which every form compiles without spills: `python -m stm_kernels.gpu.model --sweep`; `narrow` is
# of the key channels


def _ampere_tiles(
    block_v: int, skips: bool, biased: bool, *, narrow: bool, may_hide: bool, channel_major: bool
) -> ForwardTiles:
    if block_v <= 128:
        if skips:
            return ForwardTiles(128 if narrow else 64, 64, block_v, 8, 2)
        if biased and (may_hide or not narrow):
            return ForwardTiles(64, 64, block_v, 4 if narrow else 8, 2)
        return ForwardTiles(128, 64, block_v, 8, 2)
    if channel_major:
        return ForwardTiles(64, (32 if biased else 64) if skips else (64 if biased else 128), 256, 8, 2)
    if skips:
        return ForwardTiles(64, 32, min(512, block_v), 8, 2)
    if may_hide:
        return ForwardTiles(64, 64, 256, 8, 2)
    return ForwardTiles(64, 128, 256, 8, 2) if block_v < 512 else ForwardTiles(64, 64, 512, 8, 2)


def _hopper_tiles(
    block_v: int, skips: bool, biased: bool, kind: str, *, narrow: bool, may_hide: bool, channel_major: bool
) -> ForwardTiles:
    if block_v > 128:
        if channel_major and biased and not skips and not may_hide and block_v >= 512:
            return ForwardTiles(64, 64, 512, 8, 2)
        if channel_major and (biased or skips):
            return ForwardTiles(128, 32, 256, 8, 2)
        return ForwardTiles(128, 64, 256, 8, 2 if skips or may_hide else 3, kind)
    if skips:
        return ForwardTiles(128 if narrow else 64, 64, block_v, 8, 2)
    if narrow and may_hide and not channel_major:
        return ForwardTiles(64, 128, block_v, 4, 2)
    if narrow and not may_hide:
        return ForwardTiles(128, 128, block_v, 8, 2, kind)
    return ForwardTiles(128, 64, block_v, 8, 2 if may_hide else 3, kind)


def _rdna3_tiles(dtype: torch.dtype, block_c: int, block_v: int, skips: bool) -> ForwardTiles:
    # `skip` drops blocks of 32 positions
    block_n = 32 if skips else 16
    if dtype == torch.float32:
        return ForwardTiles(32, block_n, min(64, block_v), 16, 1)
    if block_c <= 64:
        return ForwardTiles(64, 32, min(128, block_v), 8, 1)
    return ForwardTiles(64, block_n, min(128 if block_c > 128 else 256, block_v), 16, 1)


def affinity_tiles(architecture: str, dtype: torch.dtype, C: int, *, skips: bool = False) -> AffinityTiles:
    """Choose the tile of a written affinity; `architecture` as `architecture_of` names it, C key channels, `skips`
    where blocks of it may be dropped.
    """
    if architecture == INTERPRETER:
        return AffinityTiles(32, 32, 32, 4, 1)
    if dtype == torch.float32:
        # gradients of channel-major values spill with 16 channels
        return AffinityTiles(64, 64, 32 if architecture == "sm_120" and not skips else 16, 8, 1)
    # two steps through the key channels or more: a loop of one is unrolled into the next one, and spills
    block_k = 64 if C > 64 and not architecture.startswith(RDNA3) else 32
    return AffinityTiles(128, 128 if architecture in LARGE_TILES and not skips else 64, block_k, 8, 3)


def usage_tiles(architecture: str, dtype: torch.dtype, C: int) -> UsageTiles:
    """Choose the tile of a column sum; `architecture` as `architecture_of` names it."""
    if architecture == INTERPRETER:
        return UsageTiles(32, 32, 4, 1)
    if architecture.startswith(RDNA3) and padded(C) <= 128:
        return UsageTiles(32, 32, 16, 1) if dtype == torch.float32 else UsageTiles(64, 64, 8, 2)
    if dtype == torch.float32 or padded(C) > 128:
        return UsageTiles(32, 32, 4, 1)
    if architecture in ("sm_80", "sm_90") and padded(C) <= 64:
        return UsageTiles(128, 64, 4, 2)
    if architecture in ("sm_100", "sm_103"):
        # 128 positions spill with channel-major inputs and a bias
        return UsageTiles(64, 64, 4, 2)
    return UsageTiles(64, 128, 8, 3)


def merge_tiles(architecture: str, V: int) -> MergeTiles:
    """Choose the tile of a merge, which only moves memory: small ones, so that there are many."""
    return MergeTiles(32 if architecture == INTERPRETER else 4, min(256, padded(V)), 4)


def group_tiles(architecture: str, dtype: torch.dtype, C: int) -> GroupTiles:
    """Choose the tiles of the maxima of groups; `architecture` as `architecture_of` names it."""
    if architecture == INTERPRETER:
        return GroupTiles(32, 32, 64, 4, 1, 64, 4)
    if architecture.startswith(RDNA3) and padded(C) <= 128:
        float32 = dtype == torch.float32
        return GroupTiles(32, 16, 1024, 16, 1, 32, 4) if float32 else GroupTiles(64, 32, 1024, 8, 1, 32, 4)
    if dtype == torch.float32 or padded(C) > 128:
        return GroupTiles(32, 32, 1024, 4, 1, 32, 4)
    return GroupTiles(128, 128 if architecture in LARGE_TILES else 64, 1024, 8, 3, 32, 4)


def select_tiles(architecture: str, width: int) -> SelectTiles:
    """Choose the tile of a selection among `width` columns: as many rows as fill the program's registers."""
    block = min(MAX_GROUPS, padded(width))
    if architecture == INTERPRETER:
        return SelectTiles(32, block, 4)
    per_warp = 256 if architecture == "sm_120" else 512
    return SelectTiles(max(1, 2048 // block), block, max(4, block // per_warp))


def groups_per_chunk(queries: int) -> int:
    """Groups of memory positions whose maxima with all `queries` (B · M) are kept at once."""
    return min(MAX_GROUPS, max(MIN_GROUPS, KEPT_MAXIMA // queries))


def keys_per_chunk(queries: int) -> int:
    """Memory positions whose affinity with all `queries` (B · M) is written out at once."""
    return max(MIN_KEYS_PER_CHUNK, WRITTEN_LOGITS // queries // 128 * 128)


def padded(channels: int) -> int:
    """The least block that holds so many channels: a power of two, and no less than a tensor core takes."""
    return max(16, 1 << (channels - 1).bit_length())


def staged_is_cheaper(architecture: str, dtype: torch.dtype, C: int, V: int, channel_major: bool = False) -> bool:
    """Whether the affinity is better written out than computed anew for every slice of so many value channels.

    Per query and position the slices cost 2·C·slices operations, the other way 4·C and two trips to memory.
    """
    tiles = forward_tiles(architecture, dtype, C, V, channel_major=channel_major)
    return triton.cdiv(V, tiles.block_v) >= STAGED_SLICES


def forward_splits(tiles: ForwardTiles, B: int, M: int, N: int, V: int, multiprocessors: int) -> tuple[int, int]:
    """Into how many parts to cut the memory so that every multiprocessor has work, and the positions of a part.

    A part costs what its positions cost, a start and an end; a merge costs a launch and its traffic.
    """
    programs = triton.cdiv(V, tiles.block_v) * triton.cdiv(M, tiles.block_m) * B
    blocks = triton.cdiv(N, tiles.block_n)
    best = (math.inf, 1, blocks)
    for splits in range(1, max(1, min(blocks * tiles.block_n // MIN_KEYS_PER_SPLIT, MAX_SPLITS)) + 1):
        blocks_per_split = triton.cdiv(blocks, splits)
        splits = triton.cdiv(blocks, blocks_per_split)
        waves = triton.cdiv(programs * splits, multiprocessors)
        cost = waves * (blocks_per_split * tiles.block_n + KEYS_PER_START)
        if splits > 1:
            cost += KEYS_PER_MERGE + splits * B * M * V * KEYS_PER_MERGED_VALUE
        best = min(best, (cost, splits, blocks_per_split))
    _, splits, blocks_per_split = best
    return splits, blocks_per_split * tiles.block_n
