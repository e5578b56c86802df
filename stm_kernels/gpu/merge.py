"""Partial reads to one, by log-sum-exp: one program merges a block of rows and value channels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stm_kernels.gpu.launch import Launch, architecture_of
from stm_kernels.gpu.tuning import merge_tiles


@triton.jit
def merge_kernel(
    outs_ptr, lses_ptr, out_ptr, lse_ptr, parts, rows, V,
    BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    blocks_v = tl.cdiv(V, BLOCK_V)
    row = (tl.program_id(0) // blocks_v).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    v = tl.program_id(0) % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)
    seen = row < rows
    # [rows]; a finite start, since -inf - (-inf) is NaN in a row with no visible key
    top = tl.full([BLOCK_ROWS], -1e300, tl.float64)
    for part in range(parts):
        top = tl.maximum(top, tl.load(lses_ptr + part * rows + row, mask=seen, other=float("-inf")))
    # [rows, V]
    total = tl.zeros([BLOCK_ROWS, BLOCK_V], tl.float32)
    weights = tl.zeros([BLOCK_ROWS], tl.float32)
    for part in range(parts):
        lse = tl.load(lses_ptr + part * rows + row, mask=seen, other=float("-inf"))
        # the difference is taken in float64: a large log-sum-exp loses no digit
        weight = tl.exp((lse - top).to(tl.float32))
        places = (part * rows + row)[:, None] * V + v[None, :]
        outs = tl.load(outs_ptr + places, mask=seen[:, None] & (v[None, :] < V), other=0.0)
        total += weight[:, None] * outs.to(tl.float32)
        weights += weight
    empty = weights == 0.0
    weights = tl.where(empty, 1.0, weights)
    out = (total / weights[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * V + v[None, :], out, mask=seen[:, None] & (v[None, :] < V))
    if tl.program_id(0) % blocks_v == 0:
        lse = tl.where(empty, float("-inf"), top + tl.log(weights.to(tl.float64)))
        tl.store(lse_ptr + row, lse, mask=seen)


def merge_launch(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, architecture: str) -> Launch:
    """The launch that merges `outs` `[S, B, M, V]` and `lses` `[S, B, M]`, float64, into `out` and `lse`; all
    contiguous.
    """
    parts, B, M, V = outs.shape
    tiles = merge_tiles(architecture, V)
    arguments = {
        "outs_ptr": outs,
        "lses_ptr": lses,
        "out_ptr": out,
        "lse_ptr": lse,
        "parts": parts,
        "rows": B * M,
        "V": V,
        "BLOCK_ROWS": tiles.block_rows,
        "BLOCK_V": tiles.block_v,
    }
    grid = (triton.cdiv(B * M, tiles.block_rows) * triton.cdiv(V, tiles.block_v),)
    return Launch(merge_kernel, grid, arguments, tiles.num_warps, 1)


def triton_merge(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The whole read `[B, M, V]` in `dtype` and its log-sum-exp `[B, M]` in float64, of contiguous parts."""
    out = outs.new_empty(outs.shape[1:], dtype=dtype)
    lse = lses.new_empty(lses.shape[1:])
    merge_launch(outs, lses, out, lse, architecture_of(outs.device)).run(outs.device)
    return out, lse
