"""Matrix products in buffers that are reused: what the reads in plain PyTorch share."""

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

from stm_kernels.affinity import wide_dtype

PROCESSOR = Path("/proc/cpuinfo")
# fewer take longer to begin than they gain
ONEDNN_MULTIPLICATIONS = 2**21


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


def steady_slices(length: int, frame: int, most: int) -> list[slice]:
    """Cover `range(length)` by slices no longer than `most`, of few lengths whatever multiple of `frame` that is.

    A library that compiles a product for every size of its matrices keeps what it compiled: of a memory that grows by
    frames, even slices would be of ever new lengths, and take more memory than the frames do.
    """
    stretch = max(frame, most // frame * frame)
    return [
        slice(start + part.start, start + part.stop)
        for start in range(0, length, stretch)
        for part in even_slices(min(stretch, length - start), most)
    ]


@functools.cache
def mkl_holds_back() -> bool:
    """Whether PyTorch's float32 products leave the processor's AVX-512 unused: MKL does on AMD's, oneDNN does not."""
    maker = PROCESSOR.read_text() if PROCESSOR.is_file() else platform.processor()
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in maker


def by_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether `left · right` is faster by oneDNN: a call costs more, so small products are not."""
    if left.dtype != torch.float32 or left.device.type != "cpu":
        return False
    return left.numel() * right.shape[1] >= ONEDNN_MULTIPLICATIONS and mkl_holds_back()


def product(name: str, left: Tensor, right: Tensor, scratch: Scratch, scale: float = 1.0) -> Tensor:
    """`scale · left · right`, in the buffer of that name or where the faster library puts it."""
    if not by_onednn(left, right):
        out = scratch.take(name, len(left), right.shape[1], left.dtype)
        return torch.addmm(out, left, right, beta=0, alpha=scale, out=out)
    if not (right.is_contiguous() or right.mT.is_contiguous()):
        # oneDNN takes a thousand times as long over a matrix with gaps
        right = scratch.take("without gaps", *right.shape, right.dtype).copy_(right)
    # the operator that torch.compile makes of a linear layer: PyTorch gives no other way to choose the library
    products = torch.ops.mkldnn._linear_pointwise(left, right.mT, None, "none", [], "")
    return products if scale == 1 else products.mul_(scale)


def key_products(query_key: Tensor, keys: Tensor, wide: torch.dtype, scratch: Scratch) -> Tensor:
    """`query_key · keysᵀ` in a buffer of the wide dtype, as exact as its accumulation."""
    narrow = query_key.dtype
    if narrow != wide and mkl_holds_back():
        # without tile registers a product in float32 takes no longer than two in bfloat16
        query_key, narrow = scratch.cast("wide_query_key", query_key, wide), wide
    keys = scratch.cast("wide_keys", keys, narrow).mT
    if narrow == wide:
        return product("products", query_key, keys, scratch)
    # one product is rounded to 8 bits, a second one returns what the first has lost
    rounded = product("rounded", query_key, keys, scratch)
    products = scratch.cast("products", rounded, wide)
    lost = rounded.addmm_(query_key, keys, beta=-1)
    return products.add_(scratch.cast("widened", lost, wide))
