"""Matrix products in buffers that are reused: what the reads in plain PyTorch share."""

import torch
from torch import Tensor

from stm_kernels.affinity import wide_dtype


class Scratch:
    """Buffers by name, allocated at their first and largest use and lent again for every chunk."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = self.buffers[name] = torch.empty(rows * columns, dtype=dtype, device=self.device)
        return buffer[: rows * columns].view(rows, columns)

    def cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix in `dtype`: itself where it has that dtype already."""
        if tensor.dtype == dtype:
            return tensor
        return self.take(name, *tensor.shape, dtype).copy_(tensor)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of matrix products: bfloat16 where the processor multiplies it, else the accumulator's."""
    if tensor.dtype == torch.bfloat16 and (tensor.is_cuda or torch.cpu._is_avx512_bf16_supported()):
        return torch.bfloat16
    return wide_dtype(tensor.dtype)


def even_slices(length: int, most: int) -> list[slice]:
    """Cover `range(length)` by slices of nearly equal length, none longer than `most`, the longest first."""
    if not length:
        return []
    count = -(-length // most)
    size = -(-length // count)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def key_products(query_key: Tensor, keys: Tensor, wide: torch.dtype, scratch: Scratch) -> Tensor:
    """`query_key · keysᵀ` in a buffer of the wide dtype, as exact as its accumulation."""
    shape, narrow = (len(query_key), len(keys)), query_key.dtype
    products = scratch.take("products", *shape, wide)
    keys = scratch.cast("keys", keys, narrow).mT
    if narrow == wide:
        return torch.mm(query_key, keys, out=products)
    # one product is rounded to 8 bits, a second one returns what the first has lost
    rounded = torch.mm(query_key, keys, out=scratch.take("rounded", *shape, narrow))
    products.copy_(rounded)
    lost = rounded.addmm_(query_key, keys, beta=-1)
    return products.add_(scratch.cast("widened", lost, wide))
