"""The read of the k best memory positions of each query, which holds k logits a query.

An implementation only selects (`chunked_select`, `triton_select` on a GPU); the rest is shared. `embedding_bag`
sums the values without gathering them, and the gradients of the memory by the transposed bags, one a position, in the
order of a stable sort: bit-equal from run to run.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from stm_kernels.affinity import Affinity, wide_dtype
from stm_kernels.cpu.gemm import even_slices

Select = Callable[[Affinity, int], tuple[Tensor, Tensor]]
"""The chosen positions `[B, M, min(k, N)]`, int32, and their logits in `wide_dtype`, of a memory of at least one
position: the k greatest; ties go to the lower index and keep their order. Padding sorts last: logit -inf, index 0.
"""

# in elements: values or keys gathered at once, and copied at once of a table whose rows are not contiguous
GATHERED = 2**20
COPIED = 2**22
MIN_CHANNELS = 16


def top_k_read(affinity: Affinity, memory_value: Tensor, k: int, select: Select) -> tuple[Tensor, Tensor, Tensor]:
    """Read the k best of a memory of at least one position.

    Args:
        affinity: the weights of the positions.
        memory_value: `[B, N, V]`, in the dtype of the keys.
        k: positions per query.
        select: chooses them.

    Returns:
        The read `[B, M, V]`, the log-sum-exp of the chosen `[B, M]` in float64, and the chosen as `Select` has them,
        but hidden ones last, as the index of a visible one.
    """
    indices, logits = _hidden_last(affinity, *select(affinity, k))
    return *weighted_read(memory_value, indices, logits), indices


def _hidden_last(affinity: Affinity, indices: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen and their logits, hidden ones last and as the index of a visible position: 0 times NaN is NaN."""
    if affinity.key_bias is None or not affinity.may_hide:
        return indices, logits
    order = logits.isneginf().to(torch.uint8).argsort(dim=2, stable=True)
    indices, logits = indices.gather(2, order), logits.gather(2, order)
    first = affinity.hidden().to(torch.uint8).argmin(1).to(indices.dtype)  # type: ignore[union-attr]
    return torch.where(logits.isneginf(), first[:, None, None], indices), logits


def weighted_read(memory_value: Tensor, indices: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The read `[B, M, V]` of given positions `[B, M, K]` and its log-sum-exp `[B, M]`, float64."""
    lse = logits.double().logsumexp(2)
    weights = _softmax(logits).to(memory_value.dtype)
    out = memory_value.new_empty(*indices.shape[:2], memory_value.shape[2])
    for item in range(len(out)):
        for channels, table in contiguous_parts(memory_value[item]):
            out[item, :, channels] = F.embedding_bag(indices[item], table, mode="sum", per_sample_weights=weights[item])
    # where all is hidden, what stands for it is hidden too: its weight of 0 times NaN is NaN
    return out.masked_fill_(lse.isneginf()[:, :, None], 0.0), lse


def top_k_read_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    affinity: Affinity,
    memory_value: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `top_k_read`, with the choice as given.

    Args:
        grad_out: `[B, M, V]`, gradient by the read.
        grad_lse: `[B, M]` float64, gradient by the log-sum-exp.
        affinity, memory_value: of the read.
        out, lse, indices: what `top_k_read` returned.

    Returns:
        As `chunked_read_backward`.
    """
    query_key, memory_key, key_bias = affinity.query_key, affinity.memory_key, affinity.key_bias
    grad_query_key, grad_memory_key, grad_memory_value = map(torch.empty_like, (query_key, memory_key, memory_value))
    grad_key_bias = None if key_bias is None else torch.empty_like(key_bias)
    wide = wide_dtype(query_key.dtype)
    empty, hidden = lse.isneginf()[:, :, None], affinity.hidden()
    seen = None if hidden is None else (~hidden).sum(1)
    for item in range(len(query_key)):
        chosen = indices[item]
        weights = _softmax(_logits_of(affinity, item, chosen, seen))
        grad_weights = _sampled_products(grad_out[item], memory_value[item], chosen)
        # not out · grad_out: with a single position the difference is all rounding error
        grad_weights -= (weights * grad_weights).sum(1, keepdim=True)
        grad_logits = weights * (grad_weights + grad_lse[item, :, None].to(wide))
        grad_logits.masked_fill_(empty[item], 0.0)
        for channels, table in contiguous_parts(memory_key[item], wide):
            grads = F.embedding_bag(chosen, table, mode="sum", per_sample_weights=grad_logits * affinity.scale)
            grad_query_key[item, :, channels] = grads.masked_fill_(empty[item], 0.0)
        bags = _Transposed(chosen, memory_key.shape[1])
        bags.sum_into(grad_memory_value[item], grad_out[item], weights)
        bags.sum_into(grad_memory_key[item], query_key[item], grad_logits * affinity.scale)
        if grad_key_bias is not None:
            grad_key_bias[item] = bags.sum(grad_logits)
    return grad_query_key, grad_memory_key, grad_memory_value, grad_key_bias


def top_k_usage(affinity: Affinity, k: int, select: Select) -> Tensor:
    """The softmax mass of each position over all queries `[B, N]`, in `wide_dtype`, of a read of the k best."""
    return chosen_usage(*select(affinity, k), affinity.memory_key.shape[1])


def chosen_usage(indices: Tensor, logits: Tensor, N: int, weight: Tensor | None = None) -> Tensor:
    """The softmax mass `[B, N]` of each position, of chosen ones `[B, M, K]`, their logits, and what queries count."""
    masses = _softmax(logits)
    if weight is not None:
        masses = masses * weight[:, :, None].to(masses.dtype)
    return torch.stack([_Transposed(chosen, N).sum(mass) for chosen, mass in zip(indices, masses)])


class _Transposed:
    """For each of N positions the places in `[M, K]` at which it was chosen, in order."""

    def __init__(self, chosen: Tensor, N: int) -> None:
        positions, self.places = chosen.flatten().sort(stable=True)
        self.queries = self.places // chosen.shape[1]
        every = torch.arange(N, device=chosen.device, dtype=chosen.dtype)
        self.starts = torch.searchsorted(positions, every)

    def sum(self, weights: Tensor) -> Tensor:
        """The sums `[N]` of weights `[M, K]` by position."""
        ones = weights.new_ones(len(weights), 1)
        return self._bags(ones, weights.flatten()[self.places])[:, 0]

    def sum_into(self, target: Tensor, table: Tensor, weights: Tensor) -> None:
        """Fill `target` `[N, X]` by the sums of rows of `table` `[M, X]`, weighted by `weights` `[M, K]`."""
        weights = weights.flatten()[self.places]
        for channels in even_slices(table.shape[1], max(MIN_CHANNELS, COPIED // len(target))):
            target[:, channels] = self._bags(table[:, channels].to(weights.dtype).contiguous(), weights)

    def _bags(self, table: Tensor, weights: Tensor) -> Tensor:
        return F.embedding_bag(self.queries, table, self.starts, mode="sum", per_sample_weights=weights)


def _softmax(logits: Tensor) -> Tensor:
    """The weights of chosen positions; all 0 in a row with no visible key."""
    top = logits.amax(-1, keepdim=True)
    return logits.softmax(-1).masked_fill_(top.isneginf(), 0.0)


def _logits_of(affinity: Affinity, item: int, chosen: Tensor, seen: Tensor | None) -> Tensor:
    """The logits `[M, K]` of chosen positions of one batch item, in `wide_dtype`; -inf after the `seen` `[B]`."""
    logits = _sampled_products(affinity.query_key[item], affinity.memory_key[item], chosen) * affinity.scale
    if affinity.key_bias is not None:
        logits += affinity.key_bias[item][chosen]
    if seen is not None:
        # hidden ones come last
        columns = torch.arange(chosen.shape[1], device=chosen.device)
        logits.masked_fill_(columns >= seen[item], -math.inf)
    return logits


def _sampled_products(left: Tensor, table: Tensor, chosen: Tensor) -> Tensor:
    """`left · tableᵀ` of `[M, X]` and `[N, X]` at the chosen places only: `[M, K]`, in `wide_dtype`."""
    M, K = chosen.shape
    wide = wide_dtype(left.dtype)
    products = left.new_zeros(M, K, dtype=wide)
    for channels, part in contiguous_parts(table):
        for block in even_slices(M, max(1, GATHERED // (K * part.shape[1]))):
            rows = part.index_select(0, chosen[block].flatten()).to(wide).view(-1, K, part.shape[1])
            products[block] += (rows * left[block, None, channels]).sum(2)
    return products


def contiguous_parts(table: Tensor, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
    """A table `[N, X]` in a dtype: whole if it is contiguous and has that dtype, else in slices of its columns."""
    dtype = dtype or table.dtype
    if table.is_contiguous() and table.dtype == dtype:
        yield slice(None), table
        return
    for channels in even_slices(table.shape[1], max(MIN_CHANNELS, COPIED // len(table))):
        yield channels, table[:, channels].to(dtype).contiguous()
