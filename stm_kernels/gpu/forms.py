"""The forms whose tiles a model chooses: the launch of each, and what one iteration of its main loop does.

All at the size of the standard model at 480p, in bfloat16 and token-major, unless they are named otherwise. What
selects and gathers the k best, and what merges, multiplies no matrices; the gradients' products are those of a library.
None of these is here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from stm_kernels.affinity import Affinity, block_map_shape
from stm_kernels.gpu.affinity import affinity_launch
from stm_kernels.gpu.fill import MULTIPROCESSORS
from stm_kernels.gpu.forward import PageTable, forward_launch
from stm_kernels.gpu.launch import Launch
from stm_kernels.gpu.tma import descriptor_launch
from stm_kernels.gpu.top_k import GROUP, group_max_launch
from stm_kernels.gpu.tuning import (
    TMA_ARCHITECTURES,
    AffinityTiles,
    ForwardTiles,
    GroupTiles,
    UsageTiles,
    affinity_tiles,
    forward_splits,
    forward_tiles,
    group_tiles,
    groups_per_chunk,
    keys_per_chunk,
    padded,
    usage_tiles,
)
from stm_kernels.gpu.usage import usage_launch

DTYPE = torch.bfloat16
# two objects, and 20 remembered frames of 480 × 864 pixels
B, M, N = 2, 1620, 32400
PAGE = 1280
SKIP = 1e-3
# of what is tried: more of them hide latency, of which the model knows nothing, and take shared memory
STAGES = 2
# accumulators of a thread, beyond which nothing else has a register
MAX_ACCUMULATORS = 128


@dataclass(frozen=True)
class Work:
    """A launch, and what it does on a problem."""

    launch: Launch
    operations: float
    """Useful ones of one iteration of one program."""
    read_bytes: float
    """What that iteration moves between the multiprocessor and all beyond it."""
    programs: int
    iterations: int
    """Of the main loop of one program."""
    moved_bytes: int
    """All inputs and results, once."""


class Form(Protocol):
    """A kernel in one of its forms, for an architecture of `MULTIPROCESSORS`, C key and V value channels."""

    def default(self, architecture: str, C: int, V: int) -> Any:
        """The tiles that `tuning` has."""

    def choices(self, architecture: str, C: int, V: int) -> Sequence[Any]:
        """Tiles whose accumulators leave registers for all else."""

    def work(self, architecture: str, tiles: Any, C: int, V: int) -> Work:
        """The launch with these tiles, as an operator makes it."""


@dataclass(frozen=True)
class Read:
    """The forward read, by TMA where its form allows."""

    skips: bool = False
    """Whether values may be dropped; the work is that of a read that drops none."""
    biased: bool = False
    """Whether there is a bias."""
    may_hide: bool = False
    """Whether the bias may hide positions, and memories have lengths."""
    paged: bool = False
    """Whether the memory lies in pages."""
    channel_major: bool = False
    """Whether inputs are `[B, C, N]` in memory, as convolutions of maps that are not channels-last leave them."""

    @property
    def descriptors(self) -> bool:
        return not (self.skips or self.may_hide or self.paged or self.channel_major)

    def default(self, architecture: str, C: int, V: int) -> ForwardTiles:
        form = {"skips": self.skips, "biased": self.biased, "may_hide": self.may_hide}
        form |= {"descriptors": self.descriptors, "channel_major": self.channel_major}
        return forward_tiles(architecture, DTYPE, C, V, **form)

    def choices(self, architecture: str, C: int, V: int) -> list[ForwardTiles]:
        kinds = ("portable", "descriptor")[: 1 + (self.descriptors and architecture in TMA_ARCHITECTURES)]
        sizes = product((64, 128), (32, 64, 128), (128, 256, 512), (4, 8), (STAGES,), kinds)
        tiles = [ForwardTiles(*size) for size in sizes]
        return [one for one in tiles if one.block_v <= padded(V) and _fits(one.block_m * one.block_v, one.num_warps)]

    def work(self, architecture: str, tiles: ForwardTiles, C: int, V: int) -> Work:
        splits, part = forward_splits(tiles, B, M, N, V, MULTIPROCESSORS[architecture])
        affinity, value = _affinity(C), _empty(B, N, V)
        if self.channel_major:
            affinity, value = Affinity(_empty(B, C, M).mT, _empty(B, C, N).mT, C**-0.5), _empty(B, V, N).mT
        if self.biased:
            affinity = replace(affinity, key_bias=_empty(B, N, of=torch.float32), may_hide=self.may_hide)
        if self.may_hide:
            affinity = replace(affinity, lengths=_empty(B, of=torch.int32))
        out = _empty(splits, B, M, V, of=DTYPE if splits == 1 else torch.float32)
        lse, skipped = _empty(splits, B, M, of=torch.float64), _empty(splits, B, M, of=torch.float32)
        if tiles.kind == "portable":
            skip = SKIP if self.skips else 0.0
            kept = _empty(*block_map_shape(B, M, N, skip), of=torch.uint8)
            addresses = _empty(triton.cdiv(N, PAGE), of=torch.int64)
            pages = PageTable(addresses, addresses, PAGE, N) if self.paged else None
            launch = forward_launch(affinity, value, out, lse, skipped, kept, skip, tiles, part, pages)
        else:
            launch = descriptor_launch(affinity, value, out, lse, tiles, part)
        read_bytes = DTYPE.itemsize * tiles.block_n * (C + tiles.block_v)
        return _work(launch, affinity, C + V, read_bytes, triton.cdiv(part, tiles.block_n), value, out)


@dataclass(frozen=True)
class Gradient:
    """The affinity of a chunk and its gradient, of which library products make the gradients of the inputs. The
    iterations of both its loops count like those of the longer one.
    """

    skips: bool = False
    """Whether blocks may have been dropped; the work is that of a read that dropped none."""

    def default(self, architecture: str, C: int, V: int) -> AffinityTiles:
        return affinity_tiles(architecture, DTYPE, C, skips=self.skips)

    def choices(self, architecture: str, C: int, V: int) -> list[AffinityTiles]:
        sizes = product((64, 128, 256), (64, 128, 256), (32, 64, 128), (4, 8), (STAGES,))
        tiles = [AffinityTiles(*size) for size in sizes]
        # two accumulators
        return [
            one for one in tiles if one.block_k <= padded(C) and _fits(2 * one.block_m * one.block_n, one.num_warps)
        ]

    def work(self, architecture: str, tiles: AffinityTiles, C: int, V: int) -> Work:
        size = min(N, keys_per_chunk(B * M))
        affinity, value, grad_out = _affinity(C, size), _empty(B, size, V), _empty(B, M, V)
        row_top, delta = _empty(B, M, of=torch.float64), _empty(B, M, of=torch.float32)
        weights, grad_logits = _empty(B, M, size), _empty(B, M, size)
        kept = _empty(*block_map_shape(B, M, size, SKIP), of=torch.uint8) if self.skips else None
        launch = affinity_launch(affinity, row_top, weights, tiles, (value, grad_out, delta, grad_logits), kept)
        iterations = triton.cdiv(C, tiles.block_k) + triton.cdiv(V, tiles.block_k)
        written = 2 * tiles.block_m * tiles.block_n / iterations
        read_bytes = DTYPE.itemsize * (tiles.block_k * (tiles.block_m + tiles.block_n) + written)
        return _work(launch, affinity, C + V, read_bytes, iterations, value, grad_out, weights, grad_logits)


class Usage:
    """The column sums of the affinity."""

    def default(self, architecture: str, C: int, V: int) -> UsageTiles:
        return usage_tiles(architecture, DTYPE, C)

    def choices(self, architecture: str, C: int, V: int) -> list[UsageTiles]:
        # an H100's warp-groups multiply 64 rows; fewer leave it to warps, which the model takes to be as fast
        sizes = product((64, 128), (64, 128, 256), (4, 8), (STAGES,))
        tiles = [UsageTiles(*size) for size in sizes]
        return [one for one in tiles if _fits(one.block_m * one.block_n, one.num_warps)]

    def work(self, architecture: str, tiles: UsageTiles, C: int, V: int) -> Work:
        affinity, row_top, usage = _affinity(C), _empty(B, M, of=torch.float64), _empty(B, N, of=torch.float32)
        launch = usage_launch(affinity, row_top, usage, tiles)
        read_bytes = tiles.block_m * (DTYPE.itemsize * C + row_top.itemsize)
        return _work(launch, affinity, C, read_bytes, triton.cdiv(M, tiles.block_m), usage)


class Maxima:
    """The greatest logit of each group, the one step of a choice of the k best that multiplies matrices."""

    def default(self, architecture: str, C: int, V: int) -> GroupTiles:
        return group_tiles(architecture, DTYPE, C)

    def choices(self, architecture: str, C: int, V: int) -> list[GroupTiles]:
        default = self.default(architecture, C, V)
        tiles = [
            replace(default, block_m=block_m, block_n=block_n, num_warps=warps, num_stages=STAGES)
            for block_m, block_n, warps in product((64, 128), (32, 64, 128, 256), (4, 8))
        ]
        return [one for one in tiles if _fits(one.block_m * one.block_n, one.num_warps)]

    def work(self, architecture: str, tiles: GroupTiles, C: int, V: int) -> Work:
        size = min(N, groups_per_chunk(B * M) * GROUP)
        affinity, maxima = _affinity(C, size), _empty(B * M, triton.cdiv(size, GROUP), of=torch.float32)
        launch = group_max_launch(affinity, maxima, tiles)
        written = tiles.block_m * tiles.block_n // GROUP * maxima.itemsize
        read_bytes = DTYPE.itemsize * tiles.block_n * C + written
        return _work(launch, affinity, C, read_bytes, triton.cdiv(tiles.positions, tiles.block_n), maxima)


# by the names of `defaults.default_launches`
FORMS: dict[str, Form] = {
    "read": Read(),
    "read, l2": Read(biased=True),
    "read, bias and lengths": Read(biased=True, may_hide=True),
    "read, paged": Read(paged=True),
    "read, skipping": Read(skips=True),
    "read, channel-major": Read(channel_major=True),
    "read, channel-major, l2": Read(channel_major=True, biased=True),
    "read, channel-major, bias and lengths": Read(channel_major=True, biased=True, may_hide=True),
    "read, channel-major, skipping": Read(channel_major=True, skips=True),
    "affinity and gradient": Gradient(),
    "the same, skipping": Gradient(skips=True),
    "usage": Usage(),
    "maxima": Maxima(),
}


def _empty(*shape: int, of: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(shape, dtype=of, device="meta")


def _affinity(C: int, positions: int = N) -> Affinity:
    return Affinity(_empty(B, M, C), _empty(B, positions, C), C**-0.5)


def _fits(accumulators: int, warps: int) -> bool:
    return accumulators <= warps * 32 * MAX_ACCUMULATORS


def _work(
    launch: Launch, affinity: Affinity, channels: int, read_bytes: float, iterations: int, *others: Tensor
) -> Work:
    """That of a launch which multiplies so many channels of each query and position, and moves keys and `others`; what
    it computes for rows beyond the last query, and in a part beyond the memory, is not useful.
    """
    programs = math.prod(launch.grid)
    operations = 2 * math.prod(affinity.sizes) * channels / (programs * iterations)
    moved_bytes = sum(tensor.nbytes for tensor in (affinity.query_key, affinity.memory_key, *others))
    return Work(launch, operations, read_bytes, programs, iterations, moved_bytes)
