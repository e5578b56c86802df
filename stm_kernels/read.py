"""The public read: shapes, errors and the choice of implementation."""


import torch
from einops import rearrange
from torch import Tensor, nn

from stm_kernels.chunked import chunked_read
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
        implementation: "auto" (triton on a GPU, chunked elsewhere), "triton", "chunked" or "reference". One asked
            for by name never falls back to another.

    Returns:
        The read `[B, M, V]` in the dtype of the inputs; with `return_lse` also the natural log-sum-exp `[B, M]` in
        float32 (float64 for float64 inputs). An empty memory reads zeros, with a log-sum-exp of -inf.

    Raises:
        TypeError: an input is no floating-point tensor, or `scale` no number.
        ValueError: shapes, dtypes or devices disagree, or a setting is out of range.

    Source: Oh et al. 2019, Space-Time Memory Networks, equation 1.
    """
    if scale is None:
        scale = query_key.shape[-1] ** -0.5
    if implementation == "auto":
        implementation = default_implementation(query_key.device)
    reads = {"reference": reference_read, "chunked": chunked_read}
    out, lse = reads[implementation](query_key, memory_key, memory_value, scale)
    return (out, lse) if return_lse else out


def space_time_memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    scale: float | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Read a memory of whole frames into a feature map, without copying the memory.

    Args:
        query_key: `[B, C, H, W]`, the frame that asks.
        memory_key: `[B, C, T, H, W]`, the remembered frames; any strides (T, H and W merge without a copy when
            contiguous or channels-last). Their grid may differ from the query's.
        memory_value: `[B, V, T, H, W]`.
        scale: as in `memory_read`.
        implementation: as in `memory_read`.

    Returns:
        The read `[B, V, H, W]`.

    Raises:
        TypeError, ValueError: as in `memory_read`.

    Source: Oh et al. 2019, Space-Time Memory Networks, equation 1.
    """
    read = memory_read(
        rearrange(query_key, "b c h w -> b (h w) c"),
        rearrange(memory_key, "b c t h w -> b (t h w) c"),
        rearrange(memory_value, "b v t h w -> b (t h w) v"),
        scale=scale,
        implementation=implementation,
    )
    return rearrange(read, "b (h w) v -> b v h w", h=query_key.shape[2])


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
        return torch.cat([read, query_value], dim=1), None


def default_implementation(device: torch.device | str) -> str:
    """Name the implementation that `auto` takes on a device.

    Args:
        device: the device of the inputs.

    Returns:
        "triton" for a GPU, "chunked" for any other device.
    """
    return "triton" if torch.device(device).type == "cuda" else "chunked"
