"""Reads of all pages of a memory that are more than the merge of a read of each: by `top_k`, and with the usage."""

import math

import torch
from torch import Tensor

from stm_kernels.affinity import Affinity, wide_dtype
from stm_kernels.cpu.flash import has_tiles
from stm_kernels.cpu.top_k import chosen_usage, weighted_read
from stm_kernels.cpu.usage import chunked_read_with_usage
from stm_kernels.memory.pages import Pages
from stm_kernels.merge import ReadResult, merge_results
from stm_kernels.operator import autocast_inputs, flat, resolve_implementation, select, shift_back
from stm_kernels.options import ReadOptions
from stm_kernels.read import usage_checked
from stm_kernels.reference import reference_usage


def read_top_k(
    pages: Pages, query_key: Tensor, options: ReadOptions, weight: Tensor | None = None
) -> tuple[ReadResult, Tensor]:
    """The read of the `top_k` best positions of all pages, in two passes over the pages, and their usage.

    Each page selects its best; the best of these are the best of all, and are read page by page.
    """
    if query_key.requires_grad and torch.is_grad_enabled():
        raise ValueError("query_key: expected no gradients of top_k in several pages, got requires_grad=True")
    k, start, shift = options.top_k, 0, None
    logits = query_key.new_empty(*query_key.shape[:2], 0, dtype=wide_dtype(query_key.dtype))
    positions = logits.int()
    for key, _ in pages.stream():
        page_positions, page_logits, shift = select(options, query_key, *autocast_inputs(key))
        # ties go to the earlier position, which stands first in a stable sort
        logits, order = torch.cat([logits, page_logits], 2).sort(dim=2, descending=True, stable=True)
        positions = torch.cat([positions, page_positions + start], 2).gather(2, order[..., :k])
        logits, start = logits[..., :k], start + key.shape[1]
    merged: ReadResult | None = None
    start = 0
    for _, value in pages.stream():
        (value,) = autocast_inputs(value)
        elsewhere = (positions < start) | (positions >= start + value.shape[1])
        here = (positions - start).masked_fill_(elsewhere, 0)
        out, lse = weighted_read(value, here, logits.masked_fill(elsewhere, -math.inf))
        part = ReadResult(out, lse, torch.zeros_like(lse, dtype=torch.float32))
        merged = part if merged is None else merge_results(merged, part)
        start += value.shape[1]
    assert merged is not None
    lse = merged.lse if shift is None else shift_back(merged.lse, shift)
    usage = chosen_usage(positions, logits, pages.length, weight)
    return ReadResult(merged.out.to(query_key.dtype), lse, merged.skipped), usage


def usage_comes_with_read(pages: Pages, query_key: Tensor, options: ReadOptions) -> bool:
    """Whether `read_with_usage` can read this, and faster than two passes."""
    differentiated = torch.is_grad_enabled() and query_key.requires_grad
    if differentiated or options.top_k is not None or options.skip or not pages.length or pages.on_host:
        return False
    dtype = autocast_inputs(query_key)[0].dtype
    return (
        options.implementation != "reference"
        and resolve_implementation(options.implementation, query_key) == "chunked"
        # what PyTorch's flash attention reads takes no weights out of it
        and not (dtype == torch.bfloat16 and has_tiles())
    )


def read_with_usage(
    pages: Pages, query_key: Tensor, options: ReadOptions, weight: Tensor | None
) -> tuple[ReadResult, Tensor]:
    """The exact read of all pages, in a CPU's memory, and their usage, in one pass."""
    affinities, values, shift = [], [], None
    for page in pages.stream():
        key, value = autocast_inputs(*page)
        bias, _, scale, shift = flat(options, query_key, key)
        affinities.append(Affinity(query_key, key, scale, bias, may_hide=False))
        values.append(value)
    out, lse, usages = chunked_read_with_usage(affinities, values, weight)
    lse = lse if shift is None else shift_back(lse, shift)
    return ReadResult(out, lse, torch.zeros_like(lse, dtype=torch.float32)), torch.cat(usages, 1)


def usage_of_pages(
    pages: Pages, query_key: Tensor, lse: Tensor | None, options: ReadOptions, weight: Tensor | None
) -> Tensor:
    """The usage by a pass over the keys; without the log-sum-exp `[B, M]` of the read all keys are gathered."""
    (nothing,) = autocast_inputs(pages.new_page(0)[0])
    if lse is None:
        keys = [nothing, *(autocast_inputs(key)[0].clone() for key, _ in pages.stream())]
        return reference_usage(query_key, torch.cat(keys, 1), weight=weight, **options.meaning(query_key.shape[2]))
    if weight is not None:
        # w · exp(logit - lse) is exp(logit - (lse - log w))
        lse = lse - weight.to(lse.dtype).log()
    usages = [usage_checked(options, lse, query_key, nothing)]
    for key, _ in pages.stream():
        usages.append(usage_checked(options, lse, query_key, *autocast_inputs(key)))
    return torch.cat(usages, 1)
