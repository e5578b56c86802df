"""The backward of the read, staged per chunk of memory positions: one program recomputes a tile of the affinity and its
gradient, and matrix products turn the chunk of both into the gradients of the inputs. No atomics: bit-equal run to run.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stm_kernels.gpu.launch import Launch, architecture_of, refuse_interpreted_bfloat16, strides
from stm_kernels.gpu.tiles import load_tile
from stm_kernels.gpu.tuning import backward_keys_per_chunk, backward_tiles


@triton.jit
def affinity_kernel(
    query_key_ptr, memory_key_ptr, memory_value_ptr, grad_out_ptr, row_top_ptr, delta_ptr, weights_ptr, grad_logits_ptr,
    query_key_stride_b, query_key_stride_m, query_key_stride_c,
    memory_key_stride_b, memory_key_stride_n, memory_key_stride_c,
    memory_value_stride_b, memory_value_stride_n, memory_value_stride_v,
    grad_out_stride_b, grad_out_stride_m, grad_out_stride_v,
    M, N, scale, scale_log2,
    C: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    # neighbours in time share their keys and values, which are many; all queries together stay in the cache anyway
    first_m = program % blocks_m * BLOCK_M
    first_n = program // blocks_m % blocks_n * BLOCK_N
    b = (program // blocks_m // blocks_n).to(tl.int64)
    query_key_ptr += b * query_key_stride_b
    memory_key_ptr += b * memory_key_stride_b
    memory_value_ptr += b * memory_value_stride_b
    grad_out_ptr += b * grad_out_stride_b

    # [M, N]
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, C, BLOCK_K):
        queries = load_tile(
            query_key_ptr, first_m, M, query_key_stride_m, first, C, query_key_stride_c, BLOCK_M, BLOCK_K
        )
        keys = load_tile(
            memory_key_ptr, first_n, N, memory_key_stride_n, first, C, memory_key_stride_c, BLOCK_N, BLOCK_K
        )
        products = tl.dot(queries, tl.trans(keys), products, input_precision="ieee")
    # [M, N]
    grad_weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, V, BLOCK_K):
        grad_out = load_tile(grad_out_ptr, first_m, M, grad_out_stride_m, first, V, grad_out_stride_v, BLOCK_M, BLOCK_K)
        values = load_tile(
            memory_value_ptr, first_n, N, memory_value_stride_n, first, V, memory_value_stride_v, BLOCK_N, BLOCK_K
        )
        grad_weights = tl.dot(grad_out, tl.trans(values), grad_weights, input_precision="ieee")

    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    rows = b * M + m
    # in two parts: a rounding of it would tilt the whole row
    row_top = tl.load(row_top_ptr + rows, mask=m < M, other=0.0)
    rounded = row_top.to(tl.float32)
    rest = (row_top - rounded).to(tl.float32)
    weights = tl.exp2((products - rounded[:, None] - rest[:, None]) * scale_log2)
    delta = tl.load(delta_ptr + rows, mask=m < M, other=0.0)
    grad_logits = weights * (grad_weights - delta[:, None]) * scale
    inside = (m[:, None] < M) & (n[None, :] < N)
    places = rows[:, None] * N + n[None, :]
    tl.store(weights_ptr + places, weights.to(weights_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_logits_ptr + places, grad_logits.to(grad_logits_ptr.dtype.element_ty), mask=inside)


def affinity_launch(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    grad_out: Tensor,
    row_top: Tensor,
    delta: Tensor,
    weights: Tensor,
    grad_logits: Tensor,
    scale: float,
    architecture: str,
) -> Launch:
    """The launch that fills `weights` and `grad_logits`, both contiguous `[B, M, N]`, for a chunk of N positions.

    `row_top` `[B, M]`, float64, is the log-sum-exp divided by `scale`; `delta` `[B, M]`, float32, is what the softmax
    subtracts from the gradients of a row's weights.
    """
    (B, M, C), N, V = query_key.shape, memory_key.shape[1], memory_value.shape[2]
    tiles = backward_tiles(architecture, query_key.dtype)
    arguments = {
        "query_key_ptr": query_key,
        "memory_key_ptr": memory_key,
        "memory_value_ptr": memory_value,
        "grad_out_ptr": grad_out,
        "row_top_ptr": row_top,
        "delta_ptr": delta,
        "weights_ptr": weights,
        "grad_logits_ptr": grad_logits,
        **strides("query_key", query_key, "bmc"),
        **strides("memory_key", memory_key, "bnc"),
        **strides("memory_value", memory_value, "bnv"),
        **strides("grad_out", grad_out, "bmv"),
        "M": M,
        "N": N,
        "scale": scale,
        "scale_log2": scale * math.log2(math.e),
        "C": C,
        "V": V,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
    }
    grid = (triton.cdiv(M, tiles.block_m) * triton.cdiv(N, tiles.block_n) * B,)
    return Launch(affinity_kernel, grid, arguments, tiles.num_warps, tiles.num_stages)


def triton_read_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a read of at least one position; arguments and results as in `chunked_read_backward`."""
    refuse_interpreted_bfloat16(query_key)
    (B, M, _), N, device = query_key.shape, memory_key.shape[1], query_key.device
    grad_query_key, grad_memory_key, grad_memory_value = map(torch.empty_like, (query_key, memory_key, memory_value))
    delta = (grad_out.float() * out).sum(2) - grad_lse.float()
    row_top = lse / scale
    total = torch.zeros_like(query_key, dtype=torch.float32)
    size = min(N, backward_keys_per_chunk(B * M))
    scratch = query_key.new_empty(2, B * M * size)
    for start in range(0, N, size):
        chunk = slice(start, min(start + size, N))
        keys, values = memory_key[:, chunk], memory_value[:, chunk]
        shape = (B, M, keys.shape[1])
        weights, grad_logits = (buffer[: shape[0] * shape[1] * shape[2]].view(shape) for buffer in scratch)
        launch = affinity_launch(
            query_key, keys, values, grad_out, row_top, delta, weights, grad_logits, scale, architecture_of(device)
        )
        launch.run(device)
        grad_memory_value[:, chunk] = weights.mT @ grad_out
        grad_memory_key[:, chunk] = grad_logits.mT @ query_key
        total += grad_logits @ keys
    grad_query_key.copy_(total)
    return grad_query_key, grad_memory_key, grad_memory_value
