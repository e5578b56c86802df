"""The backward of the read, staged per chunk of memory positions: the affinity and its gradient are written out in the
dtype of the inputs, and matrix products turn both into the gradients of the inputs. No atomics: bit-equal run to run.
"""

import torch
from torch import Tensor

from stm_kernels.affinity import SKIP_POSITIONS, Affinity
from stm_kernels.gpu.affinity import affinity_launch, chunk_of, product, row_top_of, visible
from stm_kernels.gpu.launch import architecture_of, refuse_interpreted_bfloat16
from stm_kernels.gpu.tuning import affinity_tiles, keys_per_chunk


def triton_read_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    affinity: Affinity,
    memory_value: Tensor,
    out: Tensor,
    lse: Tensor,
    skipped: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of a read of at least one position; arguments and results as in `chunked_read_backward`."""
    query_key, memory_key, key_bias = affinity.query_key, affinity.memory_key, affinity.key_bias
    refuse_interpreted_bfloat16(query_key)
    B, M, N = affinity.sizes
    grad_query_key, grad_memory_key, grad_memory_value = map(torch.empty_like, (query_key, memory_key, memory_value))
    grad_key_bias = None if key_bias is None else torch.empty_like(key_bias)
    # what was read is weighed up to 1: a softmax of its own
    share = 1 - skipped.double()
    row_top = row_top_of(lse + share.log(), affinity.scale)
    delta = (grad_out.float() * out).sum(2) - (grad_lse * share).float()
    total = torch.zeros_like(query_key, dtype=torch.float32)
    architecture, C = architecture_of(query_key.device), query_key.shape[2]
    tiles = affinity_tiles(architecture, query_key.dtype, C, skips=kept.ndim == 3)
    size = min(N, keys_per_chunk(B * M))
    scratch = query_key.new_empty(2, B * M * size)
    for start in range(0, N, size):
        chunk = slice(start, min(start + size, N))
        part, values = chunk_of(affinity, start, size), memory_value[:, chunk]
        shape = (B, M, values.shape[1])
        weights, grad_logits = (buffer[: shape[0] * shape[1] * shape[2]].view(shape) for buffer in scratch)
        gradient = (values, grad_out, delta, grad_logits)
        read = kept[:, :, start // SKIP_POSITIONS :] if kept.ndim == 3 else None
        affinity_launch(part, row_top, weights, tiles, gradient, read).run(query_key.device)
        grad_memory_value[:, chunk] = weights.mT @ grad_out
        grad_memory_key[:, chunk] = grad_logits.mT @ query_key
        if grad_key_bias is not None:
            grad_key_bias[:, chunk] = grad_logits.sum(1, dtype=torch.float32) / affinity.scale
        total += product(grad_logits, visible(part.memory_key, part))
    grad_query_key.copy_(total)
    return grad_query_key, grad_memory_key, grad_memory_value, grad_key_bias
