"""The public reads: arguments, errors, and the forms in which memories and results come."""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from einops import rearrange
from torch import Tensor, nn

from stm_kernels import operator
from stm_kernels.merge import ReadResult
from stm_kernels.operator import autocast_inputs
from stm_kernels.options import ReadOptions, check_rows, check_tensors
from stm_kernels.reference import reference_read, reference_usage

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from stm_kernels.options import ReadKeywords


@overload
def memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_skipped: Literal[False] = False,
    **options: "Unpack[ReadKeywords]",
) -> Tensor: ...
@overload
def memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    return_lse: bool = False,
    return_skipped: bool = False,
    **options: "Unpack[ReadKeywords]",
) -> Any: ...
def memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    scale: float | None = None,
    similarity: str = "dot",
    key_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    top_k: int | None = None,
    skip: float = 0.0,
    return_lse: bool = False,
    return_skipped: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Read a memory: for every query the mean of all memory values, weighted by the softmax of its similarities.

    Args:
        query_key: `[B, M, C]`, float16, bfloat16, float32 or float64; any strides.
        memory_key: `[B, N, C]`, same dtype and device; any strides. N = 0 is an empty memory.
        memory_value: `[B, N, V]`, same dtype and device; any strides. The values of K objects that share their keys
            lie side by side, `[B, N, K·V]`: the affinity is computed once for all.
        scale: factor of the similarity; None is C ** -0.5 (the released model), 1.0 the paper's equation.
        similarity: "dot", the dot product, or "l2", the negative squared distance of STCN.
        key_bias: `[B, N]`, any floating dtype, added to every logit of a memory position; -inf hides the position,
            which may hold anything, NaN included.
        lengths: `[B]`, integers on the device of the inputs, 0 to N: how many positions each memory of a batch has.
            What follows is padding and may hold anything, NaN included.
        top_k: weigh only so many positions, those of the greatest logits; ties go to the lower index. None is all.
        skip: softmax mass that a query may drop, in [0, 1); the rest is renormalised. What is dropped is up to the
            implementation: on a CPU positions that weigh less than skip / N, where few weigh more; on a GPU blocks of
            positions that hold next to no mass of any query nearby. The result is off by at most
            2 · skip · max |memory_value|; 0 is the exact read. `implementation="reference"` drops nothing.
        return_lse: also return the log-sum-exp of the logits (of the `top_k` greatest).
        return_skipped: also return the dropped softmax mass.
        implementation: "auto" (triton on a GPU, except for float64 and C > 256; chunked elsewhere), "triton", "chunked"
            or "reference". One asked for by name never falls back to another.

    Returns:
        The read `[B, M, V]` in the dtype of the inputs (autocast's dtype under autocast); with `return_lse` also the
        natural log-sum-exp `[B, M]` in float32 (float64 for float64 inputs), of all positions, dropped or not; with
        `return_skipped` also the dropped mass `[B, M]` in float32, at most `skip`. The first two are differentiable
        once; with `skip` the positions that were read count as given. A query with no visible key reads zeros, with a
        log-sum-exp of -inf.

    Raises:
        TypeError: an input is not a tensor of the expected kind, or a setting not a number.
        ValueError: shapes, dtypes or devices disagree, a setting is out of range, or the implementation asked for
            cannot read these inputs.
        ImportError: `implementation="triton"` where triton is not installed.

    Source: Oh et al. 2019, Space-Time Memory Networks, equation 1. "l2": Cheng et al. 2021, Rethinking Space-Time
    Networks, section 4. `top_k`: Cheng et al. 2021, Modular Interactive Video Object Segmentation, section 3.2.
    """
    options = ReadOptions(scale, similarity, key_bias, lengths, top_k, skip, implementation)
    inputs = checked_inputs(options, query_key, memory_key, memory_value)
    return read_checked(options, *inputs).chosen(return_lse, return_skipped)


def checked_inputs(
    options: ReadOptions, query_key: Tensor, memory_key: Tensor, memory_value: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype; raises where they are of the wrong kind or do not fit together."""
    given = {"query_key": query_key, "memory_key": memory_key}
    if memory_value is not None:
        given["memory_value"] = memory_value
    check_tensors(given)
    inputs = autocast_inputs(*given.values())
    options.check(*inputs)
    return inputs


def read_checked(options: ReadOptions, query_key: Tensor, memory_key: Tensor, memory_value: Tensor) -> ReadResult:
    """`memory_read` of what `checked_inputs` returned, with all that it can return."""
    if options.implementation != "reference":
        return operator.read(options, query_key, memory_key, memory_value)
    out, lse = reference_read(query_key, memory_key, memory_value, **options.meaning(query_key.shape[2]))
    return ReadResult(out, lse.double(), torch.zeros_like(lse, dtype=torch.float32))


def memory_usage(
    query_key: Tensor,
    memory_key: Tensor,
    *,
    lse: Tensor | None = None,
    scale: float | None = None,
    similarity: str = "dot",
    key_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    top_k: int | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Sum the softmax mass of each memory position over all queries: the column sums of the affinity, never held.

    Args:
        query_key: `[B, M, C]`, as in `memory_read`.
        memory_key: `[B, N, C]`, as in `memory_read`.
        lse: `[B, M]`, the log-sum-exp that the read of the same arguments returned; None computes it. One of a larger
            memory, of which these positions are a part, gives their share in it. With `top_k` it must be None.
        scale, similarity, key_bias, lengths, top_k, implementation: as in `memory_read`.

    Returns:
        `[B, N]` in float32 (float64 for float64 inputs), not differentiable, bit-equal from run to run. The sum over N
        is the number of queries with a visible key.

    Raises:
        TypeError, ValueError, ImportError: as in `memory_read`.

    Source: Cheng & Schwing 2022, XMem, section 3.3.
    """
    options = ReadOptions(scale, similarity, key_bias, lengths, top_k, implementation=implementation)
    inputs = checked_inputs(options, query_key, memory_key)
    if top_k is not None and lse is not None:
        raise ValueError("lse: expected None beside top_k, which weighs other positions, got a tensor")
    if lse is not None:
        check_rows("lse", lse, query_key, query_key.shape[:2], "[B, M]")
    return usage_checked(options, lse, *inputs)


@torch.no_grad()
def usage_checked(options: ReadOptions, lse: Tensor | None, query_key: Tensor, memory_key: Tensor) -> Tensor:
    """`memory_usage` of what `checked_inputs` returned."""
    if options.implementation == "reference":
        return reference_usage(query_key, memory_key, lse=lse, **options.meaning(query_key.shape[2]))
    return operator.usage(options, lse, query_key, memory_key)


@overload
def space_time_memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_skipped: Literal[False] = False,
    **options: "Unpack[ReadKeywords]",
) -> Tensor: ...
@overload
def space_time_memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    return_lse: bool = False,
    return_skipped: bool = False,
    **options: "Unpack[ReadKeywords]",
) -> Any: ...
def space_time_memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    scale: float | None = None,
    similarity: str = "dot",
    key_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    top_k: int | None = None,
    skip: float = 0.0,
    return_lse: bool = False,
    return_skipped: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Read a memory of whole frames into a feature map, without copying the memory.

    Args:
        query_key: `[B, C, H, W]`, the current frame.
        memory_key: `[B, C, T, H, W]`, the remembered frames; any strides (T, H and W merge without a copy when
            contiguous or channels-last). Their grid may differ from the query's.
        memory_value: `[B, V, T, H, W]`.
        key_bias: `[B, T, H, W]`, as in `memory_read`.
        lengths: `[B]`, how many frames each memory has.
        scale, similarity, top_k, skip, return_lse, return_skipped, implementation: as in `memory_read`.

    Returns:
        The read `[B, V, H, W]`; with `return_lse` also the log-sum-exp `[B, H, W]`, with `return_skipped` also the
        dropped mass `[B, H, W]`.

    Raises:
        TypeError, ValueError: as in `memory_read`.

    Source: Oh et al. 2019, Space-Time Memory Networks, equation 1.
    """
    check_tensors({"query_key": query_key}, 4)
    check_tensors({"memory_key": memory_key, "memory_value": memory_value}, 5)
    frames, grid = memory_key.shape[2:], {"h": query_key.shape[2], "w": query_key.shape[3]}
    if frames != memory_value.shape[2:]:
        raise ValueError(
            f"memory_value: expected T, H, W = {list(frames)} as in memory_key, got {list(memory_value.shape[2:])}"
        )
    if isinstance(key_bias, Tensor):
        check_rows("key_bias", key_bias, query_key, (memory_key.shape[0], *frames), "[B, T, H, W]")
        key_bias = rearrange(key_bias, "b t h w -> b (t h w)")
    if isinstance(lengths, Tensor):
        lengths = lengths * (frames[1] * frames[2])
    options = ReadOptions(scale, similarity, key_bias, lengths, top_k, skip, implementation)
    inputs = checked_inputs(
        options,
        rearrange(query_key, "b c h w -> b (h w) c"),
        rearrange(memory_key, "b c t h w -> b (t h w) c"),
        rearrange(memory_value, "b v t h w -> b (t h w) v"),
    )
    out, *rows = read_checked(options, *inputs)
    out = rearrange(out, "b (h w) v -> b v h w", **grid)
    return ReadResult(out, *(rearrange(row, "b (h w) -> b h w", **grid) for row in rows)).chosen(
        return_lse, return_skipped
    )


class SpaceTimeMemoryRead(nn.Module):
    """The released STM's `Memory` module: same call, same result; one changed line drops it in.

    Args:
        scale, similarity, top_k, skip, implementation: as in `memory_read`.

    Raises:
        TypeError, ValueError: as in `memory_read`.
    """

    def __init__(
        self,
        scale: float | None = None,
        *,
        similarity: str = "dot",
        top_k: int | None = None,
        skip: float = 0.0,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.options: ReadKeywords = {
            "scale": scale,
            "similarity": similarity,
            "top_k": top_k,
            "skip": skip,
            "implementation": implementation,
        }
        ReadOptions(**self.options)

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
        read = space_time_memory_read(query_key, memory_key, memory_value, **self.options)
        if not isinstance(query_value, Tensor) or query_value.shape != read.shape:
            got = list(query_value.shape) if isinstance(query_value, Tensor) else type(query_value).__name__
            raise ValueError(f"query_value: expected [B, V, H, W] = {list(read.shape)}, got {got}")
        return torch.cat([read, query_value], dim=1), None
