"""Partial reads to one, by log-sum-exp: the same for splits, pages and ranks."""

import math

import torch
from einops import rearrange
from torch import Tensor


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
    # a row that no part can see has weight 0 everywhere, not 0/0, and so have its gradients
    empty = lses.isneginf().all(0)
    seen = lses.masked_fill(empty, 0.0)
    # not exp(lses - lse): a large log-sum-exp is rounded, and would take the weights with it
    weight = seen.softmax(0).masked_fill(empty, 0.0)
    math_dtype = torch.promote_types(outs.dtype, torch.float32)
    # a product and a sum: as a contraction this would run as B·M tiny matrix products
    out = (rearrange(weight.to(math_dtype), "s b m -> s b m 1") * outs).sum(0)
    return out.to(outs.dtype), seen.logsumexp(0).masked_fill(empty, -math.inf)
