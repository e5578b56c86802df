"""Tile choices: safe defaults by architecture, dtype and channels."""

from dataclasses import dataclass

import torch

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


@dataclass(frozen=True)
class BackwardTiles:
    """The tile of one program that recomputes a part of the affinity and its gradient."""

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


# 227 KiB of shared memory; every other GPU gets tiles that fit 99 KiB
LARGE_TILES = ("sm_90", "sm_100", "sm_103")

# logits of one pass of the backward: 2 GPU waves of tiles at M = 1620, and 128 MiB of bfloat16 scratch
BACKWARD_LOGITS = 2**25
BACKWARD_LEAST_KEYS = 1024


def forward_tiles(architecture: str, dtype: torch.dtype, C: int, V: int) -> ForwardTiles:
    """Choose the forward tile; `architecture` as `architecture_of` names it."""
    block_v = padded(V)
    if architecture == INTERPRETER:
        return ForwardTiles(32, 32, min(64, block_v), 4, 1)
    if dtype == torch.float32:
        return ForwardTiles(32, 32, min(128, block_v), 8, 1)
    if padded(C) > 128:
        return ForwardTiles(64, 32, min(256, block_v), 8, 2)
    if architecture in LARGE_TILES:
        return ForwardTiles(128, 64, min(256, block_v), 8, 3)
    return ForwardTiles(64, 64, min(256, block_v), 8, 2)


def backward_tiles(architecture: str, dtype: torch.dtype) -> BackwardTiles:
    """Choose the backward tile; `architecture` as `architecture_of` names it."""
    if architecture == INTERPRETER:
        return BackwardTiles(32, 32, 32, 4, 1)
    if dtype == torch.float32:
        return BackwardTiles(64, 64, 32, 8, 1)
    return BackwardTiles(128, 128, 64 if architecture in LARGE_TILES else 32, 8, 3)


def backward_keys_per_chunk(queries: int) -> int:
    """Memory positions whose affinity with all `queries` (B · M) the backward holds at once."""
    return max(BACKWARD_LEAST_KEYS, BACKWARD_LOGITS // queries // 128 * 128)


def padded(channels: int) -> int:
    """The least block that holds so many channels: a power of two, and no less than a tensor core takes."""
    return max(16, 1 << (channels - 1).bit_length())
