"""Tiles worth measuring on a GPU, the default first, and the Triton read with given ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stm_kernels.affinity import Affinity
from stm_kernels.testing import Read


def forward_candidates(
    architecture: str, dtype: torch.dtype, C: int, V: int, skips: bool = False, descriptors: bool = False
) -> list[Any]:
    """Tiles of the read worth measuring, the default first; arguments as in `forward_tiles`."""
    from stm_kernels.gpu.launch import INTERPRETER
    from stm_kernels.gpu.tuning import TMA_ARCHITECTURES, ForwardTiles, forward_tiles, padded

    default = forward_tiles(architecture, dtype, C, V, skips=skips, descriptors=descriptors)
    fetched: dict[str, list[tuple[int, int, int, int, int]]] = {}
    if architecture == INTERPRETER:
        shapes = [(64, 32, 64, 4, 1), (32, 64, 16, 4, 1)]
    elif dtype == torch.float32:
        shapes = [(32, 32, 64, 4, 1), (64, 32, 64, 8, 1), (32, 64, 128, 8, 1), (64, 32, 128, 16, 1)]
    else:
        shapes = [
            (128, 64, 256, 8, 2),
            (128, 32, 256, 8, 3),
            (128, 64, 128, 8, 3),
            (128, 128, 128, 8, 2),
            (64, 64, 256, 8, 2),
            (64, 64, 256, 4, 2),
            (64, 64, 512, 8, 2),
            (64, 32, 512, 8, 2),
            (64, 64, 128, 4, 3),
            (64, 128, 128, 4, 2),
        ]
        if descriptors and not skips and architecture in TMA_ARCHITECTURES:
            fetched["descriptor"] = [(128, 64, 256, 8, 3), (128, 64, 256, 8, 2), (128, 128, 128, 8, 2), *shapes[-5:]]
            fetched["warp-specialized"] = [(128, 64, 256, 4, 2), (128, 64, 256, 4, 3), (128, 64, 128, 4, 3)]
            shapes.insert(0, (128, 64, 256, 8, 3))
    others = [
        ForwardTiles(m, n, min(v, padded(V)), warps, stages, kind)
        for kind, shapes in {"portable": shapes, **fetched}.items()
        for m, n, v, warps, stages in shapes
    ]
    return list(dict.fromkeys([default, *others]))


def affinity_candidates(architecture: str, dtype: torch.dtype, C: int, skips: bool = False) -> list[Any]:
    """Tiles of the backward worth measuring, the default first."""
    from stm_kernels.gpu.launch import INTERPRETER
    from stm_kernels.gpu.tuning import affinity_tiles

    default = affinity_tiles(architecture, dtype, C, skips=skips)
    if architecture == INTERPRETER:
        shapes = [(64, 32, 32, 4, 1), (32, 64, 16, 4, 1)]
    elif dtype == torch.float32:
        shapes = [(64, 64, 32, 8, 1), (64, 32, 16, 4, 1), (32, 64, 16, 4, 1)]
    else:
        shapes = [
            (128, 128, 64, 8, 2),
            (128, 128, 64, 8, 4),
            (128, 128, 32, 8, 4),
            (128, 64, 64, 4, 3),
            (64, 128, 64, 4, 3),
            (128, 256, 64, 8, 3),
        ]
    others = [
        replace(default, block_m=m, block_n=n, block_k=k, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in shapes
    ]
    return list(dict.fromkeys([default, *others]))


def read_with(forward: Any = None, backward: Any = None, skip: float = 0.0) -> Read:
    """The Triton read with given tiles, as a function of a problem's tensors; None chooses as always."""
    from stm_kernels.gpu.backward import triton_read_backward
    from stm_kernels.gpu.forward import triton_read

    class TiledRead(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query_key, memory_key, memory_value, scale, key_bias, lengths):
            affinity = Affinity(query_key, memory_key, scale, key_bias, lengths)
            out, lse, skipped, kept = triton_read(affinity, memory_value, skip, tiles=forward)
            ctx.affinity, ctx.rest = affinity, (memory_value, out, lse, skipped, kept)
            return out, lse if out.dtype == torch.float64 else lse.float(), skipped

        @staticmethod
        def backward(ctx, grad_out, grad_lse, _):
            grads = triton_read_backward(grad_out, grad_lse, ctx.affinity, *ctx.rest, backward)
            return *grads[:3], None, grads[3], None

    def read(
        query_key: Tensor,
        memory_key: Tensor,
        memory_value: Tensor,
        *,
        scale: float,
        key_bias: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        return TiledRead.apply(query_key, memory_key, memory_value, scale, key_bias, lengths)

    return read


def wrong(ratios: dict[str, float]) -> str:
    """What a read errs in, in words; nothing where it keeps to its allowed error."""
    errors = {name: round(ratio, 2) for name, ratio in ratios.items() if not ratio <= 1}
    return f"error over allowed error: {errors}" if errors else ""
