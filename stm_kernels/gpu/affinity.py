"""The affinity of a chunk of memory positions, written out, and with it its gradient: one program makes one tile."""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from stm_kernels.affinity import SKIP_POSITIONS, SKIP_QUERIES, Affinity
from stm_kernels.gpu.launch import Launch, affinity_arguments, strides
from stm_kernels.gpu.tiles import biased, final_weights, load_tile, memory_length
from stm_kernels.gpu.tuning import AffinityTiles


@triton.jit
def affinity_kernel(
    query_key_ptr, memory_key_ptr, memory_value_ptr, key_bias_ptr, lengths_ptr,
    grad_out_ptr, row_top_ptr, delta_ptr, kept_ptr, weights_ptr, grad_logits_ptr,
    query_key_stride_b, query_key_stride_m, query_key_stride_c,
    memory_key_stride_b, memory_key_stride_n, memory_key_stride_c, key_bias_stride_b,
    memory_value_stride_b, memory_value_stride_n, memory_value_stride_v,
    grad_out_stride_b, grad_out_stride_m, grad_out_stride_v, kept_stride_b, kept_stride_m, kept_stride_n,
    M, N, scale, scale_log2,
    SKIP_QUERIES: tl.constexpr, SKIP_POSITIONS: tl.constexpr, C: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    # neighbours in time share their keys and values, which are many; all queries together stay in the cache anyway
    first_m = program % blocks_m * BLOCK_M
    first_n = program // blocks_m % blocks_n * BLOCK_N
    b = (program // blocks_m // blocks_n).to(tl.int64)
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    inside = (m[:, None] < M) & (n[None, :] < N)
    rows = b * M + m
    places = rows[:, None] * N + n[None, :]
    if kept_ptr is not None:
        cells = (m[:, None] // SKIP_QUERIES).to(tl.int64) * kept_stride_m + n[None, :] // SKIP_POSITIONS * kept_stride_n
        kept = tl.load(kept_ptr + b * kept_stride_b + cells, mask=inside, other=0)
        # trips through the channels: 0 or 1
        reads = tl.max(tl.max(kept.to(tl.int32), 1), 0)
    else:
        reads: tl.constexpr = 1  # type: ignore[no-redef]

    query_key_ptr += b * query_key_stride_b
    memory_key_ptr += b * memory_key_stride_b
    stop = memory_length(lengths_ptr, b, N)
    # [M, N]
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, C * reads, BLOCK_K):
        queries = load_tile(
            query_key_ptr, first_m, M, query_key_stride_m, first, C, query_key_stride_c, BLOCK_M, BLOCK_K
        )
        keys = load_tile(
            memory_key_ptr, first_n, stop, memory_key_stride_n, first, C, memory_key_stride_c, BLOCK_N, BLOCK_K
        )
        products = tl.dot(queries, tl.trans(keys), products, input_precision="ieee")
    products, seen = biased(products, key_bias_ptr, b * key_bias_stride_b, n, stop)
    weights = final_weights(products, row_top_ptr, rows, m < M, scale_log2)
    if kept_ptr is not None:
        weights *= kept
    tl.store(weights_ptr + places, weights.to(weights_ptr.dtype.element_ty), mask=inside)

    if grad_out_ptr is not None:
        grad_out_ptr += b * grad_out_stride_b
        memory_value_ptr += b * memory_value_stride_b
        # [M, N]
        grad_weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, V * reads, BLOCK_K):
            grad_out = load_tile(
                grad_out_ptr, first_m, M, grad_out_stride_m, first, V, grad_out_stride_v, BLOCK_M, BLOCK_K
            )
            values = load_tile(
                memory_value_ptr, first_n, stop, memory_value_stride_n, first, V, memory_value_stride_v,
                BLOCK_N, BLOCK_K,
            )  # fmt: skip
            grad_weights = tl.dot(grad_out, tl.trans(values), grad_weights, input_precision="ieee")
        delta = tl.load(delta_ptr + rows, mask=m < M, other=0.0)
        # a weight of 0 times NaN is NaN
        grad_logits = tl.where(seen[None, :], weights * (grad_weights - delta[:, None]) * scale, 0.0)
        tl.store(grad_logits_ptr + places, grad_logits.to(grad_logits_ptr.dtype.element_ty), mask=inside)


def affinity_launch(
    affinity: Affinity,
    row_top: Tensor,
    weights: Tensor,
    tiles: AffinityTiles,
    gradient: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    kept: Tensor | None = None,
) -> Launch:
    """The launch that fills `weights` `[B, M, N]`, contiguous, for a chunk of N positions.

    Args:
        affinity: of the chunk, by `chunk_of`.
        row_top: `[B, M]`, float64, by `row_top_of`.
        weights: to fill.
        tiles: of a program.
        gradient: `memory_value` of the chunk, `grad_out` `[B, M, V]`, `delta` `[B, M]` in float32, what the softmax
            subtracts from the gradients of a row's weights, and `grad_logits` like `weights`, to fill with the
            gradient by the dot products.
        kept: `[B, ⌈M / SKIP_QUERIES⌉, ⌈N / SKIP_POSITIONS⌉]`, uint8, 0 for blocks that were dropped.
    """
    B, M, N = affinity.sizes
    memory_value, grad_out, delta, grad_logits = gradient or (None,) * 4
    arguments = affinity_arguments(affinity) | {
        "memory_value_ptr": memory_value,
        "grad_out_ptr": grad_out,
        "row_top_ptr": row_top,
        "delta_ptr": delta,
        "kept_ptr": kept,
        "weights_ptr": weights,
        "grad_logits_ptr": grad_logits,
        **strides("memory_value", memory_value, "bnv"),
        **strides("grad_out", grad_out, "bmv"),
        **strides("kept", kept, "bmn"),
        "SKIP_QUERIES": SKIP_QUERIES,
        "SKIP_POSITIONS": SKIP_POSITIONS,
        "V": 1 if memory_value is None else memory_value.shape[2],
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
    }
    grid = (triton.cdiv(M, tiles.block_m) * triton.cdiv(N, tiles.block_n) * B,)
    return Launch(affinity_kernel, grid, arguments, tiles.num_warps, tiles.num_stages)


def chunk_of(affinity: Affinity, start: int, size: int) -> Affinity:
    """The affinity of `size` memory positions from `start` on, or of as many as there are."""
    chunk = slice(start, start + size)
    lengths = affinity.lengths
    return replace(
        affinity,
        memory_key=affinity.memory_key[:, chunk],
        key_bias=None if affinity.key_bias is None else affinity.key_bias[:, chunk],
        lengths=None if lengths is None else lengths - start,
    )


def visible(memory: Tensor, affinity: Affinity) -> Tensor:
    """Keys or values `[B, N, ·]` of a chunk as a matrix product may take them: padding and hidden positions as zeros.

    A weight of 0 times NaN is NaN.
    """
    hidden = affinity.hidden()
    return memory if hidden is None else memory.masked_fill(hidden[:, :, None], 0.0)


def row_top_of(lse: Tensor, scale: float) -> Tensor:
    """The log-sum-exp `[B, M]`, float64, as unscaled products; huge where no key is visible: its weights are 0."""
    return lse.masked_fill(lse.isneginf(), 1e30) / scale


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, batched, in float32."""
    if left.is_cuda and left.dtype != torch.float32 and not torch.version.hip:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
