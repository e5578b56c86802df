"""The public read: shapes, errors and the choice of implementation."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from einops import rearrange
from torch import Tensor, nn

from stm_kernels.affinity import as_dot_product
from stm_kernels.cpu.top_k import weighted_read
from stm_kernels.merge import merge_reads
from stm_kernels.operator import autocast_inputs, read_operator, select_operator, usage_operator
from stm_kernels.options import (
    ReadOptions,
    check_agreement,
    check_rows,
    check_tensors,
    checked_affinity,
    checked_choice,
)
from stm_kernels.reference import reference_read, reference_usage

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_skipped: Literal[False] = False,
    **options: "Unpack[ReadOptions]",
) -> Tensor: ...
@overload
def memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    return_lse: bool = False,
    return_skipped: bool = False,
    **options: "Unpack[ReadOptions]",
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
        key_bias: `[B, N]`, any floating dtype, added to every logit of a memory position; -inf hides the position.
        lengths: `[B]`, integers on the device of the inputs, 0 to N: how many positions each memory of a batch has.
            What lies behind, NaN included, is as if it were not there.
        top_k: weigh only so many positions, those of the greatest logits; of equal ones those of lower index. None is
            all.
        skip: the weight that a query may leave out in all, from 0 to below 1: blocks of memory positions of which all
            queries nearby weigh less are not read, and the rest is weighed up to 1. The result is off by at most
            2 · skip · max |memory_value|; 0 is the exact read. `implementation="reference"` leaves nothing out.
        return_lse: also return the log-sum-exp of the logits (of the `top_k` greatest).
        return_skipped: also return the weight left out.
        implementation: "auto" (triton on a GPU, but for float64 and C > 256; chunked elsewhere), "triton", "chunked"
            or "reference". One asked for by name never falls back to another.

    Returns:
        The read `[B, M, V]` in the dtype of the inputs (autocast's dtype under autocast); with `return_lse` also the
        natural log-sum-exp `[B, M]` in float32 (float64 for float64 inputs), of all positions, left out or not; with
        `return_skipped` also the weight left out `[B, M]` in float32, at most `skip`. The first two are differentiable
        once, where a read that skips takes the blocks it read as given. A query that sees no position reads zeros,
        with a log-sum-exp of -inf.

    Raises:
        TypeError: an input is no tensor of the kind expected, or a setting no number.
        ValueError: shapes, dtypes or devices disagree, a setting is out of range, or the implementation asked for
            cannot read these inputs.
        ImportError: `implementation="triton"` where triton is not installed.

    Source: Oh et al. 2019, Space-Time Memory Networks, equation 1. "l2": Cheng et al. 2021, Rethinking Space-Time
    Networks, section 4. `top_k`: Cheng et al. 2021, Modular Interactive Video Object Segmentation, section 3.2.
    """
    out, lse, skipped = read_with_float64_lse(
        query_key,
        memory_key,
        memory_value,
        scale=scale,
        similarity=similarity,
        key_bias=key_bias,
        lengths=lengths,
        top_k=top_k,
        skip=skip,
        implementation=implementation,
    )
    results = [out]
    if return_lse:
        results.append(lse if out.dtype == torch.float64 else lse.float())
    if return_skipped:
        results.append(skipped)
    return tuple(results) if len(results) > 1 else out


def read_with_float64_lse(
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
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`memory_read` with all it can return, and its log-sum-exp in float64: merging many reads by rounded ones would
    add the roundings up.
    """
    check_tensors(query_key=query_key, memory_key=memory_key, memory_value=memory_value)
    query_key, memory_key, memory_value = autocast_inputs(query_key, memory_key, memory_value)
    check_agreement(query_key, memory_key=memory_key, memory_value=memory_value)
    scale = checked_affinity(query_key, memory_key, scale, similarity, key_bias, lengths, implementation)
    top_k, skip = checked_choice(top_k, skip)
    if implementation == "reference":
        out, lse = reference_read(
            query_key, memory_key, memory_value, scale, similarity, key_bias, lengths, top_k or None
        )
        return out, lse.double(), torch.zeros_like(lse, dtype=torch.float32)
    scale, key_bias, lengths, shift = as_dot_product(query_key, memory_key, scale, similarity, key_bias, lengths)
    out, lse, skipped, _ = read_operator(
        query_key, memory_key, memory_value, key_bias, lengths, scale, top_k, skip, implementation
    )
    if shift is not None:
        # a query that sees nothing has no gradient by its shift either
        lse = lse - shift.masked_fill(lse.isneginf(), 0.0)
    return out, lse, skipped


def top_k_of_parts(
    query_key: Tensor,
    parts: Iterable[tuple[Tensor, Tensor]],
    *,
    top_k: int,
    scale: float | None = None,
    similarity: str = "dot",
    skip: float = 0.0,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`read_with_float64_lse` of the `top_k` best of a memory in parts: keys and values of each, gone through twice.

    Each part selects; the best of all selections are the best of all, and are weighed part by part.

    Raises:
        ValueError: gradients are asked for.
    """
    if query_key.requires_grad and torch.is_grad_enabled():
        raise ValueError("query_key: expected no gradients of top_k in several pages, got requires_grad=True")
    top_k, _ = checked_choice(top_k, skip)
    best: list[Tensor] = []
    ends = [0]
    for memory_key, memory_value in parts:
        check_tensors(query_key=query_key, memory_key=memory_key, memory_value=memory_value)
        query, memory_key = autocast_inputs(query_key, memory_key)
        factor = checked_affinity(query, memory_key, scale, similarity, None, None, implementation)
        check_agreement(query, memory_key=memory_key)
        factor, key_bias, _, shift = as_dot_product(query, memory_key, factor, similarity, None, None)
        positions, logits = select_operator(query, memory_key, key_bias, None, factor, top_k, implementation)
        selected = [positions + ends[-1], logits]
        ends.append(ends[-1] + memory_key.shape[1])
        if best:
            # of equal ones the earlier stands first, and a stable sort keeps it there
            positions, logits = (torch.cat(pair, 2) for pair in zip(best, selected))
            logits, order = logits.sort(dim=2, descending=True, stable=True)
            selected = [positions.gather(2, order[..., :top_k]), logits[..., :top_k]]
        best = selected
    positions, logits = best
    merged: tuple[Tensor, ...] = ()
    for start, stop, (_, memory_value) in zip(ends, ends[1:], parts):
        (memory_value,) = autocast_inputs(memory_value)
        elsewhere = (positions < start) | (positions >= stop)
        here = (positions - start).masked_fill_(elsewhere, 0)
        out, lse = weighted_read(memory_value, here, logits.masked_fill(elsewhere, -math.inf))
        part = out.to(torch.promote_types(out.dtype, torch.float32)), lse
        merged = merge_reads(*map(torch.stack, zip(merged, part))) if merged else part
    lse = merged[1] if shift is None else merged[1] - shift
    return merged[0].to(out.dtype), lse, torch.zeros_like(lse, dtype=torch.float32)


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
    """Sum what all queries of a read weigh each memory position: the column sums of the affinity, never held.

    Args:
        query_key: `[B, M, C]`, as in `memory_read`.
        memory_key: `[B, N, C]`, as in `memory_read`.
        lse: `[B, M]`, the log-sum-exp that the read of the same arguments returned; None computes it. One of a larger
            memory, of which these positions are a part, gives their share in it. With `top_k` it must be None.
        scale, similarity, key_bias, lengths, top_k, implementation: as in `memory_read`.

    Returns:
        `[B, N]` in float32 (float64 for float64 inputs), not differentiable, bit-equal from run to run. The sum over N
        is the number of queries that see any position.

    Raises:
        TypeError, ValueError, ImportError: as in `memory_read`.

    Source: Cheng & Schwing 2022, XMem, section 3.3.
    """
    check_tensors(query_key=query_key, memory_key=memory_key)
    query_key, memory_key = (tensor.detach() for tensor in autocast_inputs(query_key, memory_key))
    check_agreement(query_key, memory_key=memory_key)
    scale = checked_affinity(query_key, memory_key, scale, similarity, key_bias, lengths, implementation)
    top_k, _ = checked_choice(top_k, 0.0)
    if top_k and lse is not None:
        raise ValueError("lse: expected None beside top_k, whose choice must be made anew, got a tensor")
    if lse is not None:
        check_rows("lse", lse, query_key, query_key.shape[:2], "[B, M]")
    key_bias, lse = (None if tensor is None else tensor.detach() for tensor in (key_bias, lse))
    if implementation == "reference":
        return reference_usage(query_key, memory_key, scale, similarity, key_bias, lengths, top_k or None)
    scale, key_bias, lengths, shift = as_dot_product(query_key, memory_key, scale, similarity, key_bias, lengths)
    if lse is not None:
        lse = lse.double() if shift is None else lse.double() + shift
    return usage_operator(query_key, memory_key, key_bias, lengths, lse, scale, top_k, implementation)


@overload
def space_time_memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_skipped: Literal[False] = False,
    **options: "Unpack[ReadOptions]",
) -> Tensor: ...
@overload
def space_time_memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    return_lse: bool = False,
    return_skipped: bool = False,
    **options: "Unpack[ReadOptions]",
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
        query_key: `[B, C, H, W]`, the frame that asks.
        memory_key: `[B, C, T, H, W]`, the remembered frames; any strides (T, H and W merge without a copy when
            contiguous or channels-last). Their grid may differ from the query's.
        memory_value: `[B, V, T, H, W]`.
        key_bias: `[B, T, H, W]`, as in `memory_read`.
        lengths: `[B]`, how many frames each memory has.
        scale, similarity, top_k, skip, return_lse, return_skipped, implementation: as in `memory_read`.

    Returns:
        The read `[B, V, H, W]`; with `return_lse` also the log-sum-exp `[B, H, W]`, with `return_skipped` also the
        weight left out `[B, H, W]`.

    Raises:
        TypeError, ValueError: as in `memory_read`.

    Source: Oh et al. 2019, Space-Time Memory Networks, equation 1.
    """
    check_tensors(4, query_key=query_key)
    check_tensors(5, memory_key=memory_key, memory_value=memory_value)
    if memory_key.shape[2:] != memory_value.shape[2:]:
        raise ValueError(
            f"memory_value: expected T, H, W = {list(memory_key.shape[2:])} as in memory_key, "
            f"got {list(memory_value.shape[2:])}"
        )
    if isinstance(key_bias, Tensor):
        if key_bias.shape != (memory_key.shape[0], *memory_key.shape[2:]):
            expected = [memory_key.shape[0], *memory_key.shape[2:]]
            raise ValueError(f"key_bias: expected [B, T, H, W] = {expected}, got {list(key_bias.shape)}")
        key_bias = rearrange(key_bias, "b t h w -> b (t h w)")
    if isinstance(lengths, Tensor):
        lengths = lengths * (memory_key.shape[3] * memory_key.shape[4])
    results = memory_read(
        rearrange(query_key, "b c h w -> b (h w) c"),
        rearrange(memory_key, "b c t h w -> b (t h w) c"),
        rearrange(memory_value, "b v t h w -> b (t h w) v"),
        scale=scale,
        similarity=similarity,
        key_bias=key_bias,
        lengths=lengths,
        top_k=top_k,
        skip=skip,
        return_lse=return_lse,
        return_skipped=return_skipped,
        implementation=implementation,
    )
    height, width = query_key.shape[2:]
    if isinstance(results, Tensor):
        return rearrange(results, "b (h w) v -> b v h w", h=height, w=width)
    read, *others = results
    others = (rearrange(other, "b (h w) -> b h w", h=height, w=width) for other in others)
    return rearrange(read, "b (h w) v -> b v h w", h=height, w=width), *others


class SpaceTimeMemoryRead(nn.Module):
    """The released STM's `Memory` module: same call, same result; one changed line drops it in.

    Args:
        scale, similarity, top_k, skip, implementation: as in `memory_read`.
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
        self.scale, self.similarity, self.top_k, self.skip = scale, similarity, top_k, skip
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
            query_key,
            memory_key,
            memory_value,
            scale=self.scale,
            similarity=self.similarity,
            top_k=self.top_k,
            skip=self.skip,
            implementation=self.implementation,
        )
        if not isinstance(query_value, Tensor) or query_value.shape != read.shape:
            got = list(query_value.shape) if isinstance(query_value, Tensor) else type(query_value).__name__
            raise ValueError(f"query_value: expected [B, V, H, W] = {list(read.shape)}, got {got}")
        return torch.cat([read, query_value], dim=1), None
