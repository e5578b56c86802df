"""The choice of the k best memory positions of each query, chunk by chunk.

Products that reach a bound, which k products reach, are candidates. Where the processor has instructions for bfloat16,
which are twice as fast as those for float32 or more, the bound is sought among products of rounded keys, and only what
may reach it despite the rounding is computed as exactly as the read asks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stm_kernels.affinity import Affinity, wide_dtype
from stm_kernels.cpu.gemm import Scratch, even_slices, key_products, product, product_dtype, steady_slices
from stm_kernels.cpu.threads import Block, blocks_of, side_by_side

# long chunks, of which few positions are candidates, of as many queries as fast products have: 5 MiB of logits
QUERIES_PER_BLOCK = 416
KEYS_PER_CHUNK = 3328
# candidates are sought in groups of so many positions, by their maximum
GROUP = 10
# rounded keys are given up where positions are so alike that a query has more candidates than k times so many
MANY = 16
# multiplications a query from which rounding pays
WORTH_ROUNDING = 2**20
# in elements: keys gathered at once
GATHERED = 2**20
# of bfloat16: a number, rounded to nearest, errs by at most this part of itself
ROUNDOFF = 2.0**-8


def chunked_select(affinity: Affinity, k: int) -> tuple[Tensor, Tensor]:
    """`Select` in plain PyTorch."""
    query_key, memory_key, key_bias = affinity.query_key, affinity.memory_key, affinity.key_bias
    B, M, N = affinity.sizes
    indices = query_key.new_zeros(B, M, min(k, N), dtype=torch.int32)
    logits = query_key.new_full(indices.shape, -math.inf, dtype=wide_dtype(query_key.dtype))
    keys = [memory_key[item, : affinity.positions(item)] for item in range(B)]
    biases = [None if key_bias is None else key_bias[item, : len(keys[item])] / affinity.scale for item in range(B)]
    largest = [_largest(*each) for each in zip(keys, biases)] if _rounding_pays(affinity) else []

    def select(blocks: Sequence[Block], scratch: Scratch) -> None:
        for item, block in blocks:
            if not len(keys[item]):
                continue
            memory, queries = (keys[item], biases[item]), query_key[item, block]
            best = _best_by_rounded_keys(queries, *memory, largest[item], M, k, scratch) if largest else None
            positions, products = best or _best(queries, *memory, M, k, scratch)
            indices[item, block, : positions.shape[1]] = positions
            logits[item, block, : positions.shape[1]] = products.mul_(affinity.scale)

    side_by_side(select, blocks_of(B, M, QUERIES_PER_BLOCK, query_key.device), query_key.device)
    return indices, logits


def _best(
    queries: Tensor, keys: Tensor, bias: Tensor | None, frame: int, k: int, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """The positions `[M, ≤ k]` of the k best and their products, in `wide_dtype`, best first."""
    wide = wide_dtype(queries.dtype)
    queries = scratch.cast("query_key", queries, product_dtype(queries))
    candidates = _Candidates(queries.new_empty(len(queries), 0, dtype=wide), k)
    for chunk in steady_slices(len(keys), frame, KEYS_PER_CHUNK):
        products = key_products(queries, keys[chunk], wide, scratch)
        candidates.add(products if bias is None else products.add_(bias[chunk]), chunk.start)
    return _ordered(len(queries), k, *candidates.kept())


def _best_by_rounded_keys(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    largest: tuple[Tensor, Tensor],
    frame: int,
    k: int,
    scratch: Scratch,
) -> tuple[Tensor, Tensor] | None:
    """`_best` by rounded keys first; None where too many positions may be among the k best."""
    C, narrow, wide = keys.shape[1], torch.bfloat16, wide_dtype(queries.dtype)
    # a bias is two more channels, whose queries are 1: itself rounded, and what that has lost
    rounded = queries.new_ones(len(queries), C + (0 if bias is None else 2), dtype=narrow)
    rounded[:, :C] = queries
    errors = _errors(queries, rounded[:, :C], keys.dtype, *largest)
    candidates = _Candidates(rounded[:, :0], k, errors)
    # a video's last frames are likest the frame that reads
    for chunk in reversed(steady_slices(len(keys), frame, KEYS_PER_CHUNK)):
        rounded_keys = scratch.take("rounded_keys", (chunk.stop - chunk.start, rounded.shape[1]), narrow)
        rounded_keys[:, :C] = keys[chunk]
        if bias is not None:
            rounded_keys[:, C] = bias[chunk]
            rounded_keys[:, C + 1] = (bias[chunk] - rounded_keys[:, C]).nan_to_num_(0.0)
        candidates.add(product("rounded_products", rounded, rounded_keys.mT, scratch), chunk.start)
        if candidates.count > MANY * k * len(queries):
            return None
    rows, positions, _ = candidates.kept()
    products = queries.new_empty(len(rows), dtype=wide)
    for part in even_slices(len(rows), max(1, GATHERED // C)):
        gathered = keys.index_select(0, positions[part]).to(wide)
        products[part] = gathered.mul_(queries.index_select(0, rows[part])).sum(1)
    if bias is not None:
        products += bias[positions]
    return _ordered(len(queries), k, rows, positions, products)


def _rounding_pays(affinity: Affinity) -> bool:
    """Whether the processor has bfloat16 instructions and a query enough products."""
    cheap = affinity.query_key.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return cheap and affinity.memory_key[0].numel() >= WORTH_ROUNDING


def _largest(keys: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The greatest norm of a key and the greatest bias that is not infinite, as absolute values."""
    norms = torch.linalg.vector_norm(keys, dim=1, dtype=wide_dtype(keys.dtype))
    biases = norms.new_zeros(1) if bias is None else bias.abs().nan_to_num_(posinf=0.0)
    # of an empty memory too
    return F.pad(norms, (0, 1)).amax(), F.pad(biases, (0, 1)).amax()


def _errors(queries: Tensor, rounded: Tensor, keys: torch.dtype, norm: Tensor, bias: Tensor) -> Tensor:
    """By how much at most `[M, 1]` products of rounded queries and keys err before they are rounded themselves.

    `|q·k − q̂·k̂| ≤ |q − q̂| |k| + |q̂| |k − k̂|`; beside that what is lost of a bias, and sums of C products in float32.
    """
    wide = wide_dtype(queries.dtype)
    lost = queries - rounded.to(wide)
    of_queries, of_rounded = (torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide) for x in (lost, rounded))
    # instructions for bfloat16 take subnormal numbers for 0
    tiny = torch.finfo(torch.bfloat16).tiny * queries.shape[1]
    of_key = 0.0 if keys == torch.bfloat16 else ROUNDOFF * norm
    sums = tiny + (queries.shape[1] + 2) * 2.0**-23 * (of_rounded * norm * (1 + ROUNDOFF) + bias)
    return (of_queries + tiny) * norm + of_rounded * (of_key + tiny) + ROUNDOFF**2 * bias + sums


class _Candidates:
    """Which positions may be among the k best of each query, of the products seen so far.

    NaN counts as the greatest, as in a sort: it must show in the read.

    Args:
        best: `[M, 0]`, in the dtype and on the device of the products.
        k: positions a query.
        errors: by how much at most `[M, 1]` a product errs before it is rounded to bfloat16; None is exact.
    """

    def __init__(self, best: Tensor, k: int, errors: Tensor | None = None) -> None:
        self.best, self.k, self.errors = best, k, errors
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []
        self.count, self.thin_at = 0, 3 * k * len(best)

    def add(self, products: Tensor, start: int) -> None:
        """Find candidates among the products `[M, P]` of positions from `start` on."""
        P = products.shape[1]
        size = _group_size(P) if P > 2 * self.k * GROUP else 1
        if P % size:
            products = F.pad(products, (0, -P % size), value=-math.inf)
        groups = products.unflatten(1, (size, -1))
        maxima = groups.amax(1)
        known = self.best.shape[1]
        # of exact products ties go to the earlier one
        below = torch.le if self.errors is None and known == self.k else torch.lt
        # maxima are products of distinct positions too
        bound = self._bound(self.best if known == self.k else maxima.topk(min(self.k, maxima.shape[1]), 1).values)
        rows, columns = below(maxima, bound).logical_not_().nonzero(as_tuple=True)
        values = groups[rows, :, columns]
        which, member = below(values, bound[rows]).logical_not_().nonzero(as_tuple=True)
        rows, columns, values = rows[which], columns[which] + member * maxima.shape[1], values[which, member]
        if P % size:
            real = (columns < P).nonzero()[:, 0]
            rows, columns, values = rows[real], columns[real], values[real]
        if not len(rows):
            return
        self.found.append((rows, columns + start, values))
        self.count += len(rows)
        places = _places(rows, len(self.best))
        pool = values.new_full((len(self.best), known + int(places.max()) + 1), -math.inf)
        pool[:, :known] = self.best
        pool[rows, known + places] = values
        self.best = pool.topk(min(self.k, pool.shape[1]), 1).values
        if self.count > self.thin_at:
            self.found = [self.kept()]
            self.count = len(self.found[0][0])
            self.thin_at = max(self.thin_at, 2 * self.count)

    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, positions and products of the candidates that are left, each `[count]`."""
        rows, positions, values = (torch.cat(parts) for parts in zip(*self.found))
        left = (values < self._bound(self.best)[rows, 0]).logical_not_().nonzero()[:, 0]
        return rows[left], positions[left], values[left]

    def _bound(self, best: Tensor) -> Tensor:
        """What a candidate reaches `[M, 1]`, by the products `[M, ≤ k]` of distinct positions, best first."""
        if best.shape[1] < self.k:
            return best.new_full((len(best), 1), -math.inf)
        bound = best[:, -1:]
        if self.errors is None:
            return bound
        # what the k-th best is at least, and what a product that is as much may have been rounded to
        bound = bound.to(self.errors.dtype)
        bound = bound - bound.abs() * ROUNDOFF / (1 - ROUNDOFF) - 2 * self.errors
        return bound * torch.where(bound > 0, 1 - ROUNDOFF, (1 - ROUNDOFF) / (1 - 2 * ROUNDOFF))


def _group_size(P: int) -> int:
    """`GROUP`, or the next greater number below its double that divides a chunk of P positions: then none is padded."""
    return next((size for size in range(GROUP, 2 * GROUP) if P % size == 0), GROUP)


def _places(rows: Tensor, M: int) -> Tensor:
    """Which of its row each is, of ascending rows `[count]` below M: 0, 1, …"""
    starts = torch.searchsorted(rows, torch.arange(M, device=rows.device))
    return torch.arange(len(rows), device=rows.device) - starts[rows]


def _ordered(M: int, k: int, rows: Tensor, positions: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The positions `[M, ≤ k]` and values of the k best of each row, best first; of equal ones the lower position."""
    order = (rows * (positions.max() + 1) + positions).argsort()
    rows, positions, values = rows[order], positions[order], values[order]
    places = _places(rows, M)
    shape = (M, int(places.max()) + 1)
    in_rows, their_positions = values.new_full(shape, -math.inf), positions.new_zeros(shape)
    in_rows[rows, places] = values
    their_positions[rows, places] = positions
    in_rows, order = in_rows.sort(dim=1, descending=True, stable=True)
    return their_positions.gather(1, order[:, :k]), in_rows[:, :k]
