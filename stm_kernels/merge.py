"""Partial reads → one, by log-sum-exp: splits, pages and ranks alike."""

import math
from importlib.util import find_spec
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from stm_kernels.affinity import wide_dtype


class ReadResult(NamedTuple):
    """All that a read of a memory, or of a part of one, can return."""

    out: Tensor
    """`[B, M, V]`."""
    lse: Tensor
    """`[B, M]`, float64: merging many reads by rounded ones would add the roundings up."""
    skipped: Tensor
    """`[B, M]`, float32: the dropped softmax mass."""

    def chosen(self, return_lse: bool, return_skipped: bool = False) -> Tensor | tuple[Tensor, ...]:
        """What the caller of a public read asked for; the log-sum-exp in float32 unless the read is float64."""
        results = [self.out]
        if return_lse:
            results.append(self.lse.to(wide_dtype(self.out.dtype)))
        if return_skipped:
            results.append(self.skipped)
        return tuple(results) if len(results) > 1 else self.out


def merge_results(first: ReadResult, second: ReadResult) -> ReadResult:
    """Combine reads of two disjoint parts of one memory, in float32 or wider: round after the last merge."""
    parts, wide = (first, second), wide_dtype(second.out.dtype)
    lses, skipped = (torch.stack([getattr(part, name) for part in parts]) for name in ("lse", "skipped"))
    out, lse = merge_reads(torch.stack([part.out.to(wide) for part in parts]), lses)
    shares = (lses - lse.masked_fill(lse.isneginf(), 0.0)).exp()
    return ReadResult(out, lse, (shares * skipped).sum(0).float())


def merge_reads(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Combine reads of disjoint parts of one memory into the read of the whole.

    Args:
        outs: `[S, B, M, V]`, the read of each part.
        lses: `[S, B, M]`, natural log of the summed exponentials of each part; -inf marks an empty part.

    Returns:
        The whole read `[B, M, V]`, in the dtype of `outs`, and its log-sum-exp `[B, M]`, in the dtype of `lses`.

    Raises:
        ValueError: the shapes disagree.

    Source: Milakov & Gimelshein 2018, online softmax.
    """
    if outs.ndim != 4 or outs.shape[:3] != lses.shape:
        raise ValueError(
            f"lses: expected [S, B, M] of outs [S, B, M, V], got {list(lses.shape)} and outs {list(outs.shape)}"
        )
    if _has_kernel(outs, lses):
        from stm_kernels.gpu.merge import triton_merge

        out, lse = triton_merge(outs.contiguous(), lses.double().contiguous(), outs.dtype)
        return out, lse.to(lses.dtype)
    # a row with no visible key in any part has weight 0 everywhere, not 0/0, and so have its gradients
    empty = lses.isneginf().all(0)
    seen = lses.masked_fill(empty, 0.0)
    # not exp(lses - lse): a large log-sum-exp is rounded, and the weights with it
    weight = seen.softmax(0).masked_fill(empty, 0.0)
    # a product and a sum: as a contraction this would run as B·M tiny matrix products
    out = (rearrange(weight.to(wide_dtype(outs.dtype)), "s b m -> s b m 1") * outs).sum(0)
    return out.to(outs.dtype), seen.logsumexp(0).masked_fill(empty, -math.inf)


def _has_kernel(outs: Tensor, lses: Tensor) -> bool:
    """Whether the kernel that merges splits can merge these: on a GPU, where nothing is differentiated or traced."""
    differentiated = torch.is_grad_enabled() and (outs.requires_grad or lses.requires_grad)
    plain = type(outs) is type(lses) is Tensor and not torch.compiler.is_compiling()
    return outs.is_cuda and outs.dtype != torch.float64 and plain and not differentiated and bool(find_spec("triton"))
