"""The bfloat16 read by PyTorch's own flash attention, on processors with matrix tiles (AMX).

There a product takes less time than what is done to its result: PyTorch's kernel does all of it in one pass, while
operations on whole chunks write and read the logits ten times. It takes keys and values of one width and no float32
bias: keys are padded with zeros, and the bias is three more channels, which add up to its float32 value.
"""

import torch
from torch import Tensor

from stm_kernels.affinity import Affinity
from stm_kernels.cpu.gemm import even_slices

BIAS_CHANNELS = 3
WIDTH_MULTIPLE = 32
# products of padded keys grow with the width of the values; faster than the chunked read up to here, not tried beyond
MAX_WIDTH = 640
# bounds the padded copy of the keys
POSITIONS_PER_CALL = 2**13


def flash_reads(affinity: Affinity, memory_value: Tensor) -> bool:
    """Whether `flash_read` can read this, and faster than `chunked_read`."""
    query_key = affinity.query_key
    narrow = query_key.dtype == torch.bfloat16 and query_key.device.type == "cpu"
    return narrow and has_tiles() and _width(affinity, memory_value) <= MAX_WIDTH


def has_tiles() -> bool:
    """Whether the processor multiplies matrix tiles."""
    return torch.cpu._is_amx_tile_supported()


def flash_read(affinity: Affinity, memory_value: Tensor) -> tuple[Tensor, Tensor]:
    """Read `[B, M, V]` and log-sum-exp `[B, M]`, float64, of a memory of at least one position.

    Args:
        affinity: the weights of the positions.
        memory_value: `[B, N, V]`.

    Source: Dao et al. 2022, FlashAttention.
    """
    B, M, _ = affinity.sizes
    width = _width(affinity, memory_value)
    out = memory_value.new_zeros(B, M, memory_value.shape[2])
    lse = memory_value.new_full((B, M), -torch.inf, dtype=torch.float64)
    for item in range(B):
        seen = slice(affinity.positions(item))
        keys, values, bias = affinity.memory_key[item, seen], memory_value[item, seen], None
        if affinity.key_bias is not None:
            bias = affinity.key_bias[item, seen]
            hidden = bias.isneginf()
            if hidden.any():
                keys, values, bias = (each[~hidden] for each in (keys, values, bias))
            bias = bias / affinity.scale
        queries = _padded(affinity.query_key[item], None if bias is None else 1.0, width)
        read, total = out.new_zeros(M, width, dtype=torch.float32), lse[item, :, None]
        for chunk in even_slices(len(keys), POSITIONS_PER_CALL):
            padded = _padded(keys[chunk], None if bias is None else bias[chunk], width)
            part, part_lse = _attend(queries, padded, _padded(values[chunk], None, width), affinity.scale)
            before, total = total, torch.logaddexp(total, part_lse[:, None])
            read.mul_((before - total).exp()).add_(part * (part_lse[:, None] - total).exp().float())
        out[item], lse[item] = read[:, : out.shape[2]], total[:, 0]
    return out, lse


def _width(affinity: Affinity, memory_value: Tensor) -> int:
    """Channels of the padded keys and values."""
    channels = affinity.query_key.shape[2] + BIAS_CHANNELS * (affinity.key_bias is not None)
    return -(-max(channels, memory_value.shape[2]) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def _padded(matrix: Tensor, bias: Tensor | float | None, width: int) -> Tensor:
    """The matrix `[R, K]`, then its bias as `BIAS_CHANNELS` columns that add up to it, then zeros: `[R, width]`."""
    rows, channels = matrix.shape
    if bias is None and channels == width:
        # of channels that are not neighbours in memory the kernel would read others
        return matrix.contiguous()
    padded = matrix.new_zeros(rows, width)
    padded[:, :channels] = matrix
    if isinstance(bias, Tensor):
        for column in range(channels, channels + BIAS_CHANNELS):
            padded[:, column] = bias
            bias = bias - padded[:, column]
    elif bias is not None:
        padded[:, channels : channels + BIAS_CHANNELS] = bias
    return padded


def _attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Read `[M, width]` and log-sum-exp `[M]`, float64, of one chunk."""
    batch = (each[None, None] for each in (queries, keys, values))
    # the public function keeps its log-sum-exp to itself
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*batch, scale=scale)
    return out[0, 0], lse[0, 0].double()
