"""The read with TMA loads (sm_90+), by tensor descriptors: the loads may then run in warps of their own, beside those
that multiply.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stm_kernels.affinity import Affinity
from stm_kernels.gpu.launch import Launch, affinity_arguments
from stm_kernels.gpu.tiles import MIN_PRODUCT, biased, online_softmax, store_read
from stm_kernels.gpu.tuning import ForwardTiles, padded

ALIGNMENT = 16


@triton.jit
def descriptor_read_kernel(
    query_keys, memory_keys, memory_values, key_bias_ptr, out_ptr, lse_ptr,
    key_bias_stride_b, B, M, N, positions_per_split, scale: tl.float64, scale_log2,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    slices_v = tl.cdiv(V, BLOCK_V)
    blocks_m = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    first_v = program % slices_v * BLOCK_V
    first_m = program // slices_v % blocks_m * BLOCK_M
    b = program // slices_v // blocks_m
    start = tl.program_id(1) * positions_per_split
    stop = tl.minimum(start + positions_per_split, N)

    # [M, C]
    query_key = tl.reshape(query_keys.load([b, first_m, 0]), [BLOCK_M, BLOCK_C])
    # [M, V]
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_max = tl.full([BLOCK_M], MIN_PRODUCT, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for first_n in tl.range(start, stop, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        # [N, C]
        keys = tl.reshape(memory_keys.load([b, first_n, 0]), [BLOCK_N, BLOCK_C])
        # [M, N]
        products = tl.dot(query_key, tl.trans(keys))
        n = first_n + tl.arange(0, BLOCK_N)
        products, _ = biased(products, key_bias_ptr, b.to(tl.int64) * key_bias_stride_b, n, stop)
        weights, sums, shrink, row_max, row_sum = online_softmax(products, row_max, row_sum, scale_log2)
        # [N, V]
        values = tl.reshape(memory_values.load([b, first_n, first_v]), [BLOCK_N, BLOCK_V])
        total = tl.dot(weights.to(values.dtype), values, total * shrink[:, None])

    m = first_m + tl.arange(0, BLOCK_M)
    rows = (tl.program_id(1).to(tl.int64) * B + b) * M + m
    store_read(out_ptr, lse_ptr, total, row_max, row_sum, rows, m < M, first_v, V, scale, BLOCK_V)


def has_descriptors(*tensors: Tensor) -> bool:
    """Whether TMA can load tiles of these: contiguous rows, each aligned to 16 bytes."""
    return all(
        tensor.stride(-1) == 1
        and tensor.data_ptr() % ALIGNMENT == 0
        and all(stride > 0 and stride * tensor.itemsize % ALIGNMENT == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


def descriptor_launch(
    affinity: Affinity, memory_value: Tensor, out: Tensor, lse: Tensor, tiles: ForwardTiles, positions_per_split: int
) -> Launch:
    """The launch that reads S parts of a memory without lengths, whose bias hides nothing; arguments as in
    `forward_launch`.
    """
    (B, M, _), V = affinity.sizes, memory_value.shape[2]
    block_c = padded(affinity.query_key.shape[2])
    arguments = affinity_arguments(affinity)
    names = ("key_bias_ptr", "key_bias_stride_b", "M", "N", "scale", "scale_log2")
    arguments = {name: arguments[name] for name in names} | {
        "query_keys": TensorDescriptor.from_tensor(affinity.query_key, [1, tiles.block_m, block_c]),
        "memory_keys": TensorDescriptor.from_tensor(affinity.memory_key, [1, tiles.block_n, block_c]),
        "memory_values": TensorDescriptor.from_tensor(memory_value, [1, tiles.block_n, tiles.block_v]),
        "out_ptr": out,
        "lse_ptr": lse,
        "B": B,
        "positions_per_split": positions_per_split,
        "V": V,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_C": block_c,
        "BLOCK_V": tiles.block_v,
        "WARP_SPECIALIZE": tiles.kind == "warp-specialized",
    }
    grid = (triton.cdiv(V, tiles.block_v) * triton.cdiv(M, tiles.block_m) * B, out.shape[0])
    return Launch(descriptor_read_kernel, grid, arguments, tiles.num_warps, tiles.num_stages)
