"""The read: one program keeps a block of queries and a slice of value channels, and walks over all memory positions."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stm_kernels.gpu.launch import Launch, architecture_of, refuse_interpreted_bfloat16, strides
from stm_kernels.gpu.tiles import load_tile, online_softmax
from stm_kernels.gpu.tuning import forward_tiles, padded


@triton.jit
def read_kernel(
    query_key_ptr, memory_key_ptr, memory_value_ptr, out_ptr, lse_ptr,
    query_key_stride_b, query_key_stride_m, query_key_stride_c,
    memory_key_stride_b, memory_key_stride_n, memory_key_stride_c,
    memory_value_stride_b, memory_value_stride_n, memory_value_stride_v,
    M, N, scale: tl.float64, scale_log2,
    C: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    slices_v = tl.cdiv(V, BLOCK_V)
    blocks_m = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    first_v = program % slices_v * BLOCK_V
    first_m = program // slices_v % blocks_m * BLOCK_M
    b = (program // slices_v // blocks_m).to(tl.int64)
    query_key_ptr += b * query_key_stride_b
    memory_key_ptr += b * memory_key_stride_b
    memory_value_ptr += b * memory_value_stride_b

    # [M, C]
    query_key = load_tile(query_key_ptr, first_m, M, query_key_stride_m, 0, C, query_key_stride_c, BLOCK_M, BLOCK_C)
    # [M, V]
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for first_n in range(0, N, BLOCK_N):
        # [N, C]
        keys = load_tile(memory_key_ptr, first_n, N, memory_key_stride_n, 0, C, memory_key_stride_c, BLOCK_N, BLOCK_C)
        # [M, N]
        products = tl.dot(query_key, tl.trans(keys), input_precision="ieee")
        products = tl.where((first_n + tl.arange(0, BLOCK_N))[None, :] < N, products, float("-inf"))
        weights, shrink, row_max, row_sum = online_softmax(products, row_max, row_sum, scale_log2)
        # [N, V]
        values = load_tile(
            memory_value_ptr, first_n, N, memory_value_stride_n, first_v, V, memory_value_stride_v, BLOCK_N, BLOCK_V
        )
        total = tl.dot(weights.to(values.dtype), values, total * shrink[:, None], input_precision="ieee")

    m = first_m + tl.arange(0, BLOCK_M)
    v = first_v + tl.arange(0, BLOCK_V)
    rows = b * M + m
    out = (total / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * V + v[None, :], out, mask=(m[:, None] < M) & (v[None, :] < V))
    if first_v == 0:
        tl.store(lse_ptr + rows, row_max.to(tl.float64) * scale + tl.log(row_sum.to(tl.float64)), mask=m < M)


def forward_launch(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    architecture: str,
) -> Launch:
    """The launch that fills `out` `[B, M, V]` and `lse` `[B, M]`, both contiguous, on an architecture."""
    (B, M, C), N, V = query_key.shape, memory_key.shape[1], memory_value.shape[2]
    tiles = forward_tiles(architecture, query_key.dtype, C, V)
    arguments = {
        "query_key_ptr": query_key,
        "memory_key_ptr": memory_key,
        "memory_value_ptr": memory_value,
        "out_ptr": out,
        "lse_ptr": lse,
        **strides("query_key", query_key, "bmc"),
        **strides("memory_key", memory_key, "bnc"),
        **strides("memory_value", memory_value, "bnv"),
        "M": M,
        "N": N,
        "scale": scale,
        "scale_log2": scale * math.log2(math.e),
        "C": C,
        "V": V,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_C": padded(C),
        "BLOCK_V": tiles.block_v,
    }
    grid = (triton.cdiv(V, tiles.block_v) * triton.cdiv(M, tiles.block_m) * B,)
    return Launch(read_kernel, grid, arguments, tiles.num_warps, tiles.num_stages)


def triton_read(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Read a memory of at least one position; arguments and results as in `chunked_read`."""
    refuse_interpreted_bfloat16(query_key)
    (B, M, _), V, device = query_key.shape, memory_value.shape[2], query_key.device
    out = query_key.new_empty(B, M, V)
    lse = query_key.new_empty(B, M, dtype=torch.float64)
    forward_launch(query_key, memory_key, memory_value, out, lse, scale, architecture_of(device)).run(device)
    return out, lse
