"""The public read: shapes, errors and the choice of implementation."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from stm_kernels.operator import autocast_inputs, read_operator
from stm_kernels.reference import reference_read

IMPLEMENTATIONS = ("auto", "triton", "chunked", "reference")


def memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Read a memory: for every query the mean of all memory values, weighted by the softmax of query · key.

    Args:
        query_key: `[B, M, C]`, float16, bfloat16, float32 or float64; any strides.
        memory_key: `[B, N, C]`, same dtype and device; any strides. N = 0 is an empty memory.
        memory_value: `[B, N, V]`, same dtype and device; any strides.
        scale: factor of the dot product; None is C ** -0.5 (the released model), 1.0 the paper's equation.
        return_lse: also return the log-sum-exp of the scaled dot products.
        implementation: "auto" (triton on a GPU, but for float64 and C > 256; chunked elsewhere), "triton", "chunked"
            or "reference". One asked for by name never falls back to another.

    Returns:
        The read `[B, M, V]` in the dtype of the inputs (autocast's dtype under autocast); with `return_lse` also the
        natural log-sum-exp `[B, M]` in float32 (float64 for float64 inputs). Both are differentiable once. An empty
        memory reads zeros, with a log-sum-exp of -inf.

    Raises:
        TypeError: an input is no floating-point tensor, or `scale` no number.
        ValueError: shapes, dtypes or devices disagree, a setting is out of range, or the implementation asked for
            cannot read these inputs.
        ImportError: `implementation="triton"` where triton is not installed.

    Source: Oh et al. 2019, Space-Time Memory Networks, equation 1.
    """
    out, lse = read_with_float64_lse(query_key, memory_key, memory_value, scale, implementation)
    if not return_lse:
        return out
    return out, lse if out.dtype == torch.float64 else lse.float()


def read_with_float64_lse(
    query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float | None, implementation: str
) -> tuple[Tensor, Tensor]:
    """`memory_read` with its log-sum-exp in float64: merging many reads by rounded ones would add the roundings up."""
    _check_tensors(query_key=query_key, memory_key=memory_key, memory_value=memory_value)
    query_key, memory_key, memory_value = autocast_inputs(query_key, memory_key, memory_value)
    _check_agreement(query_key, memory_key, memory_value)
    scale = query_key.shape[2] ** -0.5 if scale is None else _checked_scale(scale)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if implementation == "reference":
        out, lse = reference_read(query_key, memory_key, memory_value, scale)
        return out, lse.double()
    return read_operator(query_key, memory_key, memory_value, scale, implementation)


def _check_tensors(ndim: int = 3, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.ndim != ndim:
            raise ValueError(f"{name}: expected {ndim} axes, got {tensor.ndim} in shape {list(tensor.shape)}")


def _check_agreement(query_key: Tensor, memory_key: Tensor, memory_value: Tensor) -> None:
    for name, tensor in (("memory_key", memory_key), ("memory_value", memory_value)):
        for what, expected, got in (
            ("dtype", query_key.dtype, tensor.dtype),
            ("device", query_key.device, tensor.device),
            ("B =", query_key.shape[0], tensor.shape[0]),
        ):
            if expected != got:
                raise ValueError(f"{name}: expected {what} {expected} as in query_key, got {got}")
    if memory_key.shape[2] != query_key.shape[2]:
        raise ValueError(f"memory_key: expected C = {query_key.shape[2]} as in query_key, got {memory_key.shape[2]}")
    if memory_value.shape[1] != memory_key.shape[1]:
        raise ValueError(
            f"memory_value: expected N = {memory_key.shape[1]} as in memory_key, got {memory_value.shape[1]}"
        )
    if 0 in (query_key.shape[2], memory_value.shape[2]):
        name = "memory_value" if query_key.shape[2] else "query_key"
        raise ValueError(f"{name}: expected at least one channel, got none")


def _checked_scale(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: expected a positive finite number, got {scale}")
    return float(scale)


def space_time_memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Read a memory of whole frames into a feature map, without copying the memory.

    Args:
        query_key: `[B, C, H, W]`, the frame that asks.
        memory_key: `[B, C, T, H, W]`, the remembered frames; any strides (T, H and W merge without a copy when
            contiguous or channels-last). Their grid may differ from the query's.
        memory_value: `[B, V, T, H, W]`.
        scale: as in `memory_read`.
        return_lse: as in `memory_read`.
        implementation: as in `memory_read`.

    Returns:
        The read `[B, V, H, W]`; with `return_lse` also the log-sum-exp `[B, H, W]`.

    Raises:
        TypeError, ValueError: as in `memory_read`.

    Source: Oh et al. 2019, Space-Time Memory Networks, equation 1.
    """
    _check_tensors(4, query_key=query_key)
    _check_tensors(5, memory_key=memory_key, memory_value=memory_value)
    if memory_key.shape[2:] != memory_value.shape[2:]:
        raise ValueError(
            f"memory_value: expected T, H, W = {list(memory_key.shape[2:])} as in memory_key, "
            f"got {list(memory_value.shape[2:])}"
        )
    read, lse = memory_read(
        rearrange(query_key, "b c h w -> b (h w) c"),
        rearrange(memory_key, "b c t h w -> b (t h w) c"),
        rearrange(memory_value, "b v t h w -> b (t h w) v"),
        scale=scale,
        return_lse=True,
        implementation=implementation,
    )
    height, width = query_key.shape[2:]
    read = rearrange(read, "b (h w) v -> b v h w", h=height, w=width)
    return (read, rearrange(lse, "b (h w) -> b h w", h=height, w=width)) if return_lse else read


class SpaceTimeMemoryRead(nn.Module):
    """The released STM's `Memory` module: same call, same result; one changed line drops it in.

    Args:
        scale: as in `memory_read`.
        implementation: as in `memory_read`.
    """

    def __init__(self, scale: float | None = None, implementation: str = "auto") -> None:
        super().__init__()
        self.scale = scale
        self.implementation = implementation

    def forward(
        self, memory_key: Tensor, memory_value: Tensor, query_key: Tensor, query_value: Tensor
    ) -> tuple[Tensor, None]:
        """Read and join the query's own value.

        Args:
            memory_key: `[B, C, T, H, W]`.
            memory_value: `[B, V, T, H, W]`.
            query_key: `[B, C, H, W]`.
            query_value: `[B, V, H, W]`.

        Returns:
            `[B, 2V, H, W]`, the read above the query value, and None in place of the affinity, which is never held.

        Raises:
            TypeError, ValueError: as in `memory_read`.
        """
        read = space_time_memory_read(
            query_key, memory_key, memory_value, scale=self.scale, implementation=self.implementation
        )
        if not isinstance(query_value, Tensor) or query_value.shape != read.shape:
            got = list(query_value.shape) if isinstance(query_value, Tensor) else type(query_value).__name__
            raise ValueError(f"query_value: expected [B, V, H, W] = {list(read.shape)}, got {got}")
        return torch.cat([read, query_value], dim=1), None
