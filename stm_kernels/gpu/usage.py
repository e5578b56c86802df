"""The column sums of the affinity: one program keeps a block of memory positions and walks over all queries."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stm_kernels.affinity import Affinity
from stm_kernels.gpu.affinity import row_top_of
from stm_kernels.gpu.forward import log_sum_exp
from stm_kernels.gpu.launch import Launch, affinity_arguments, architecture_of, refuse_interpreted_bfloat16
from stm_kernels.gpu.tiles import biased, final_weights, load_tile, memory_length
from stm_kernels.gpu.tuning import UsageTiles, padded, usage_tiles


@triton.jit
def usage_kernel(
    query_key_ptr, memory_key_ptr, key_bias_ptr, lengths_ptr, row_top_ptr, usage_ptr,
    query_key_stride_b, query_key_stride_m, query_key_stride_c,
    memory_key_stride_b, memory_key_stride_n, memory_key_stride_c, key_bias_stride_b,
    M, N, scale_log2,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_n = tl.program_id(0) % blocks_n * BLOCK_N
    b = (tl.program_id(0) // blocks_n).to(tl.int64)
    query_key_ptr += b * query_key_stride_b
    memory_key_ptr += b * memory_key_stride_b
    stop = memory_length(lengths_ptr, b, N)
    n = first_n + tl.arange(0, BLOCK_N)
    # [N, C]
    keys = load_tile(memory_key_ptr, first_n, stop, memory_key_stride_n, 0, C, memory_key_stride_c, BLOCK_N, BLOCK_C)
    usage = tl.zeros([BLOCK_N], tl.float32)
    for first_m in range(0, M, BLOCK_M):
        # [M, C]
        queries = load_tile(query_key_ptr, first_m, M, query_key_stride_m, 0, C, query_key_stride_c, BLOCK_M, BLOCK_C)
        # [M, N]
        products = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        products, _ = biased(products, key_bias_ptr, b * key_bias_stride_b, n, stop)
        m = first_m + tl.arange(0, BLOCK_M)
        weights = final_weights(products, row_top_ptr, b * M + m, m < M, scale_log2)
        usage += tl.sum(tl.where((m < M)[:, None], weights, 0.0), 0)
    tl.store(usage_ptr + b * N + n, usage, mask=n < N)


def usage_launch(affinity: Affinity, row_top: Tensor, usage: Tensor, tiles: UsageTiles) -> Launch:
    """The launch that fills `usage` `[B, N]`, float32; `row_top` `[B, M]`, float64, by `row_top_of`."""
    B, _, N = affinity.sizes
    arguments = affinity_arguments(affinity) | {
        "row_top_ptr": row_top,
        "usage_ptr": usage,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_C": padded(affinity.query_key.shape[2]),
    }
    del arguments["scale"]
    return Launch(usage_kernel, (triton.cdiv(N, tiles.block_n) * B,), arguments, tiles.num_warps, tiles.num_stages)


def triton_usage(affinity: Affinity, lse: Tensor | None) -> Tensor:
    """Column sums `[B, N]` of the affinity; arguments as in `chunked_usage`."""
    query_key = affinity.query_key
    refuse_interpreted_bfloat16(query_key)
    if lse is None:
        lse = log_sum_exp(affinity)
    B, _, N = affinity.sizes
    usage = query_key.new_empty(B, N, dtype=torch.float32)
    tiles = usage_tiles(architecture_of(query_key.device), query_key.dtype, query_key.shape[2])
    usage_launch(affinity, row_top_of(lse, affinity.scale), usage, tiles).run(query_key.device)
    return usage
