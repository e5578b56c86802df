"""Matrix products into reused buffers, by the faster of PyTorch's two libraries."""

import functools
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stm_kernels.affinity import wide_dtype

PROCESSOR = Path("/proc/cpuinfo")
# below this the overhead of a oneDNN call exceeds its gain
ONEDNN_MULTIPLICATIONS = 2**21


class Scratch:
    """Buffers by name, allocated at their first and largest use and reused for every chunk."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The buffer of that name as a matrix, its content undefined; it aliases what was taken by that name before."""
        rows, columns = shape
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = self.buffers[name] = torch.empty(rows * columns, dtype=dtype, device=self.device)
        return buffer[: rows * columns].view(rows, columns)

    def cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix in `dtype`: itself if it has that dtype already, else the buffer of that name."""
        return tensor if tensor.dtype == dtype else self.take(name, tensor.shape, dtype).copy_(tensor)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of matrix products: bfloat16 if the processor has instructions for it, else the accumulator's."""
    if tensor.dtype == torch.bfloat16 and (tensor.is_cuda or torch.cpu._is_avx512_bf16_supported()):
        return torch.bfloat16
    return wide_dtype(tensor.dtype)


def even_slices(length: int, longest: int) -> list[slice]:
    """Cover `range(length)` by slices of nearly equal length, at most `longest`, the longest first."""
    if not length:
        return []
    count = -(-length // longest)
    size = -(-length // count)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def steady_slices(length: int, frame: int, longest: int) -> list[slice]:
    """Cover `range(length)` by slices of at most `longest`, of few different lengths for any multiple of `frame`.

    oneDNN compiles a product for every matrix size and keeps it. While a memory grows by frames, even slices would have
    ever new lengths, and the compiled products would take more memory than the frames.
    """
    stretch = max(frame, longest // frame * frame)
    return [
        slice(start + part.start, start + part.stop)
        for start in range(0, length, stretch)
        for part in even_slices(min(stretch, length - start), longest)
    ]


@functools.cache
def mkl_holds_back() -> bool:
    """Whether PyTorch's float32 products do not use AVX-512: on AMD processors MKL does not, oneDNN does."""
    maker = PROCESSOR.read_text() if PROCESSOR.is_file() else platform.processor()
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in maker


def by_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether `left · right` is faster by oneDNN: large float32 products are, where MKL holds back."""
    if left.dtype != torch.float32 or left.device.type != "cpu":
        return False
    return left.numel() * right.shape[1] >= ONEDNN_MULTIPLICATIONS and mkl_holds_back()


def product(name: str, left: Tensor, right: Tensor, scratch: Scratch, scale: float = 1.0) -> Tensor:
    """`scale · left · right`, in the buffer of that name or in fresh memory, as the faster library has it."""
    if not by_onednn(left, right):
        out = scratch.take(name, (len(left), right.shape[1]), left.dtype)
        return torch.addmm(out, left, right, beta=0, alpha=scale, out=out)
    if not (right.is_contiguous() or right.mT.is_contiguous()):
        # oneDNN is a thousand times slower for a matrix with gaps between its rows
        right = scratch.take("without gaps", right.shape, right.dtype).copy_(right)
    # the operator that torch.compile uses for linear layers: PyTorch has no other way to choose the library
    products = torch.ops.mkldnn._linear_pointwise(left, right.mT, None, "none", [], "")
    return products if scale == 1 else products.mul_(scale)


def key_products(query_key: Tensor, keys: Tensor, wide: torch.dtype, scratch: Scratch) -> Tensor:
    """`query_key · keysᵀ` in the wide dtype, as exact as its accumulation."""
    narrow = query_key.dtype
    if narrow != wide and mkl_holds_back():
        # without AMX tiles one float32 product is as fast as two in bfloat16
        query_key, narrow = scratch.cast("wide_query_key", query_key, wide), wide
    keys = scratch.cast("wide_keys", keys, narrow).mT
    if narrow == wide:
        return product("products", query_key, keys, scratch)
    # one product is rounded to 8 bits; a second one computes the rounding error of the first
    rounded = product("rounded", query_key, keys, scratch)
    products = scratch.cast("products", rounded, wide)
    lost = rounded.addmm_(query_key, keys, beta=-1)
    return products.add_(scratch.cast("widened", lost, wide))
