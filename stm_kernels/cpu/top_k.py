"""The read of the k best memory positions of each query, which holds k logits a query.

An implementation only selects (`chunked_select` here, `triton_select` on a GPU); the rest is shared. `embedding_bag`
sums the values without gathering them, and the gradients of the memory by the transposed bags, one a position, in the
order of a stable sort: bit-equal from run to run.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stm_kernels.affinity import Affinity, wide_dtype
from stm_kernels.cpu.gemm import Scratch, even_slices, key_products, product_dtype, steady_slices
from stm_kernels.cpu.threads import Block, blocks_of, side_by_side

Select = Callable[[Affinity, int], tuple[Tensor, Tensor]]
"""The chosen positions `[B, M, min(k, N)]`, int32, and their logits in `wide_dtype`, of a memory of at least one
position: the k greatest; ties go to the lower index and keep their order. Padding sorts last: logit -inf, index 0.
"""

# long chunks, of which few positions are candidates, of as many queries as fast products have: 5 MiB of logits
QUERIES_PER_BLOCK = 416
KEYS_PER_CHUNK = 3328
# the k best are sought in groups of so many neighbouring positions, by their maximum
GROUP = 32
# up to this length of a chunk PyTorch's own selection is faster
SMALL_CHUNK = 2048
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


def chunked_select(affinity: Affinity, k: int) -> tuple[Tensor, Tensor]:
    """`Select` in plain PyTorch: logits above the k-th best so far are merged into the k best."""
    query_key, memory_key, key_bias = affinity.query_key, affinity.memory_key, affinity.key_bias
    B, M, N = affinity.sizes
    wide, narrow = wide_dtype(query_key.dtype), product_dtype(query_key)
    indices = query_key.new_zeros(B, M, min(k, N), dtype=torch.int32)
    logits = query_key.new_full(indices.shape, -math.inf, dtype=wide)

    def select(blocks: Sequence[Block], scratch: Scratch) -> None:
        for item, block in blocks:
            chunks = steady_slices(affinity.positions(item), M, KEYS_PER_CHUNK)
            bias = None if key_bias is None else key_bias[item] / affinity.scale
            queries = scratch.cast("query_key", query_key[item, block], narrow)
            best = queries.new_empty(len(queries), 0, dtype=wide)
            positions = indices.new_empty(best.shape)
            for chunk in chunks:
                products = key_products(queries, memory_key[item, chunk], wide, scratch)
                if bias is not None:
                    products.add_(bias[chunk])
                best, positions = _merge_best(best, positions, products, chunk.start, k)
            indices[item, block, : best.shape[1]] = positions
            logits[item, block, : best.shape[1]] = best.mul_(affinity.scale)

    side_by_side(select, blocks_of(B, M, QUERIES_PER_BLOCK, query_key.device), query_key.device)
    return indices, logits


def _group_size(P: int) -> int:
    """`GROUP`, or the next greater number below its double that divides a chunk of P positions: then none is padded."""
    return next((size for size in range(GROUP, 2 * GROUP) if P % size == 0), GROUP)


def _merge_best(best: Tensor, positions: Tensor, products: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best `[M, ≤ k]`, best first, of those so far and of a chunk `[M, P]` of positions from `start` on.

    Few are sought among the groups of neighbours whose maximum reaches a bound that k products reach. NaN counts as the
    greatest, as in a sort: it must show in the read.
    """
    P = products.shape[1]
    if not best.shape[1] and k < P <= SMALL_CHUNK:
        values, columns = products.topk(k + 1, 1)
        # topk orders ties as it likes; NaN is less than nothing
        if (values[:, 1:] < values[:, :-1]).all():
            return values[:, :k], columns[:, :k].to(positions.dtype).add_(start)
    size = _group_size(P) if P > 2 * k * GROUP else 1
    if P % size:
        # sorts behind all P, of which there are more than k
        products = F.pad(products, (0, -P % size), value=-math.inf)
    maxima = products.unflatten(1, (-1, size)).amax(2)
    if best.shape[1] == k:
        # ties go to the earlier one
        least, below = best[:, -1:], torch.le
    elif maxima.shape[1] > k:
        least, below = maxima.topk(k, 1).values[:, -1:], torch.lt
    else:
        least, below = products.new_full((len(products), 1), -math.inf), torch.lt
    groups = below(maxima, least).logical_not_().flatten().nonzero()[:, 0]
    values = products.view(-1, size).index_select(0, groups)
    rows, first = groups // maxima.shape[1], groups % maxima.shape[1] * size
    found, place = below(values, least[rows]).logical_not_().nonzero(as_tuple=True)
    if not len(found):
        return best, positions
    rows, columns, values = rows[found], first[found] + place, values[found, place]
    places = torch.arange(len(rows), device=rows.device)
    places -= torch.searchsorted(rows, torch.arange(len(best), device=rows.device))[rows]
    shape = (len(best), best.shape[1] + int(places.max()) + 1)
    places += best.shape[1]
    candidates = products.new_full(shape, -math.inf)
    candidates[:, : best.shape[1]] = best
    candidates[rows, places] = values
    candidate_positions = positions.new_zeros(shape)
    candidate_positions[:, : best.shape[1]] = positions
    candidate_positions[rows, places] = columns.add_(start).to(positions.dtype)
    candidates, order = candidates.sort(dim=1, descending=True, stable=True)
    return candidates[:, :k], candidate_positions.gather(1, order[:, :k])
