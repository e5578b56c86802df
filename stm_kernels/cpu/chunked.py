"""The read in plain PyTorch by an online softmax over chunks of keys, forward and backward: the CPU implementation.

Three facts about CPUs shape it. Page faults of fresh memory cost more than the arithmetic, so every buffer is allocated
once and reused, and no operation on a chunk mixes dtypes, which would convert through fresh memory. Batched products of
strided chunks are slow, so every product is one of two matrices. A bfloat16 product is fast but rounds its result to 8
bits, too few for a logit: products of keys are computed in float32 or, where that is slower, in two bfloat16 products,
the second of which is the rounding error of the first.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from stm_kernels.affinity import Affinity, wide_dtype
from stm_kernels.cpu.gemm import Scratch, by_onednn, key_products, product, product_dtype, steady_slices
from stm_kernels.cpu.threads import Block, blocks_of, side_by_side

LOG2_E = math.log2(math.e)

# [query block × key chunk] buffers of about 2 MiB stay in the second- and third-level caches
QUERIES_PER_BLOCK = 576
KEYS_PER_CHUNK = 1280
# the backward pass takes all queries at once, so its chunk shrinks as their number grows
BACKWARD_LOGITS = 2**20
BACKWARD_KEYS_PER_CHUNK = (64, 2048)
# the maximum of a row with no visible key so far: -inf - (-inf) is NaN
MIN_ROW_MAX = -1e30
# a weight below 2^-100 counts as 0: products with subnormal numbers are slow, on Intel processors a hundredfold
MIN_EXPONENT = -100.0

Chunk = tuple[Tensor, Tensor, Tensor | None]
"""Keys `[N, C]`, values `[N, V]`, and a bias `[N]` that is added to the unscaled products."""
Weights = tuple[Tensor, Tensor]
"""Of a chunk `[M, N]`, before they are divided by their sum, and the greatest product `[M, 1]` they are relative to."""


def chunked_read(affinity: Affinity, memory_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Read a memory of at least one position.

    Args:
        affinity: the weights of the positions.
        memory_value: `[B, N, V]`, in the dtype of the keys.

    Returns:
        As `read_operator`, but the choice: nothing is dropped. The log-sum-exp is float64: the backward pass subtracts
        it from every logit, and a rounding of it would scale a whole row of weights.

    Source: Milakov & Gimelshein 2018, online softmax.
    """
    query_key = affinity.query_key
    (B, M, _), V = affinity.sizes, memory_value.shape[2]
    out = query_key.new_empty(B, M, V)
    lse = query_key.new_empty(B, M, dtype=torch.float64)
    chunks = [chunks_of(affinity, memory_value, item) for item in range(B)]

    def read(blocks: Sequence[Block], scratch: Scratch) -> None:
        for item, block in blocks:
            found = read_block(query_key[item, block], chunks[item], V, affinity.scale, scratch)
            out[item, block], lse[item, block] = found

    side_by_side(read, blocks_of(B, M, QUERIES_PER_BLOCK, query_key.device), query_key.device)
    return out, lse, torch.zeros_like(lse, dtype=torch.float32)


def chunks_of(affinity: Affinity, memory_value: Tensor, item: int) -> list[Chunk]:
    """The memory of one batch item in parts that stay in the caches."""
    places = steady_slices(affinity.positions(item), affinity.sizes[1], KEYS_PER_CHUNK)
    bias = None if affinity.key_bias is None else affinity.key_bias[item] / affinity.scale
    key, value = affinity.memory_key[item], memory_value[item]
    return [(key[place], value[place], None if bias is None else bias[place]) for place in places]


def read_block(
    query_key: Tensor,
    chunks: Sequence[Chunk],
    V: int,
    scale: float,
    scratch: Scratch,
    held: list[Weights] | None = None,
) -> tuple[Tensor, Tensor]:
    """Read `[M, V]` and log-sum-exp `[M]` for a block of queries of one batch item. The output aliases scratch.

    `held` takes the weights of every chunk, in the dtype of the products; they alias scratch too.
    """
    wide, narrow = wide_dtype(query_key.dtype), product_dtype(query_key)
    M = len(query_key)
    query_key = scratch.cast("query_key", query_key, narrow)
    total = scratch.take("total", (M, V), wide).zero_()
    row_sum = total.new_zeros(M, 1)
    row_max = total.new_full((M, 1), -math.inf)
    places = [] if held is None else [M * len(keys) for keys, _, _ in chunks]
    room = scratch.take("held", (1, sum(places)), narrow)[0].split(places)
    for index, (keys, values, bias) in enumerate(chunks):
        products = key_products(query_key, keys, wide, scratch)
        if bias is not None:
            products.add_(bias)
        new_max = torch.maximum(row_max, products.amax(1, keepdim=True)).clamp_(min=MIN_ROW_MAX)
        shrink = power_of_two((row_max - new_max).mul_(scale * LOG2_E))
        row_max = new_max
        # the maximum is subtracted before scaling: a large logit loses no digit
        weights = power_of_two(products.sub_(row_max).mul_(scale * LOG2_E))
        row_sum.mul_(shrink).add_(weights.sum(1, keepdim=True))
        total.mul_(shrink)
        if held is None:
            weights = scratch.cast("rounded", weights, narrow)
        else:
            weights = room[index].view(M, len(keys)).copy_(weights)
            held.append((weights, row_max))
        _add_product(total, weights, scratch.cast("values", values, narrow), scratch)
    # a row with no visible key has a sum of 0
    total.div_(row_sum.clamp(min=torch.finfo(wide).tiny))
    return total, (row_max.double() * scale + row_sum.double().log_())[:, 0]


def chunked_read_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    affinity: Affinity,
    memory_value: Tensor,
    out: Tensor,
    lse: Tensor,
    skipped: Tensor,
    skip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of a read of at least one position by its inputs; the affinity is recomputed chunk by chunk.

    Args:
        grad_out: `[B, M, V]`, gradient by the read.
        grad_lse: `[B, M]` float64, gradient by the log-sum-exp.
        affinity, memory_value: of the read.
        out, lse, skipped: what `chunked_read` or `skipping_read` returned.
        skip: of the latter, else 0.

    Returns:
        The gradients by `query_key`, `memory_key` and `memory_value`, laid out as `torch.empty_like` of each, and by
        `key_bias`, if there is one.

    Source: Dao et al. 2022, FlashAttention, appendix B.4; the log-sum-exp's own gradient is subtracted from delta.
    """
    query_key, memory_key, key_bias = affinity.query_key, affinity.memory_key, affinity.key_bias
    grad_query_key, grad_memory_key, grad_memory_value = map(torch.empty_like, (query_key, memory_key, memory_value))
    grad_key_bias = None if key_bias is None else torch.zeros_like(key_bias)
    M = query_key.shape[1]
    shortest, longest = BACKWARD_KEYS_PER_CHUNK
    wide = wide_dtype(query_key.dtype)
    # what was read is renormalised: a softmax of its own
    share = 1 - skipped.double()
    for item in range(query_key.shape[0]):
        count = affinity.positions(item)
        chunks = steady_slices(count, M, max(shortest, min(longest, BACKWARD_LOGITS // M)))
        delta = (grad_out[item].to(wide) * out[item]).sum(1) - grad_lse[item] * share[item]
        bias = None if key_bias is None else key_bias[item] / affinity.scale
        inputs = (grad_out[item], query_key[item], memory_key[item], memory_value[item], bias)
        grad_bias = None if grad_key_bias is None else grad_key_bias[item]
        outputs = (grad_memory_key[item], grad_memory_value[item], grad_bias)
        # the least weight that was read, renormalised; a query that dropped nothing read all
        least = (skip / max(count, 1) / share[item]).masked_fill_(skipped[item] == 0, 0.0) if skip else None
        rows = (delta.to(wide), lse[item] + share[item].log(), least)

        gradients_of = partial(_backward_item, inputs, rows, affinity.scale, outputs)
        grad_query_key[item] = sum(side_by_side(gradients_of, chunks, query_key.device))
        grad_memory_key[item, count:] = grad_memory_value[item, count:] = 0
    return grad_query_key, grad_memory_key, grad_memory_value, grad_key_bias


def _backward_item(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    rows: tuple[Tensor, Tensor, Tensor | None],
    scale: float,
    gradients: tuple[Tensor, Tensor, Tensor | None],
    chunks: Sequence[slice],
    scratch: Scratch,
) -> Tensor:
    """Write the gradients of some positions of one batch item, and return theirs by the queries; every tensor comes
    without its batch axis.

    `rows` are delta, which the softmax subtracts from the gradients of a row's weights, the log-sum-exp, and the least
    weight that was read, None is any: `[M]`.
    """
    grad_out, query_key, memory_key, memory_value, bias = inputs
    grad_memory_key, grad_memory_value, grad_bias = gradients
    delta, lse, least = rows
    wide, narrow = delta.dtype, product_dtype(query_key)
    M, C = query_key.shape
    query_key = scratch.cast("query_key", query_key, narrow)
    grad_out = scratch.cast("grad_out", grad_out, narrow)
    shifted_grad_out = _beside(grad_out, -delta, scratch.take("shifted_grad_out", (M, grad_out.shape[1] + 2), narrow))
    row_top = row_top_parts(lse, scale, wide)
    total = scratch.take("total", (M, C), wide).zero_()
    for chunk in chunks:
        keys = scratch.cast("keys", memory_key[chunk], narrow)
        values = memory_value[chunk]
        values = _beside(values, None, scratch.take("values", (len(values), values.shape[1] + 2), narrow))
        products = key_products(query_key, keys, wide, scratch)
        if bias is not None:
            products.add_(bias[chunk])
        weights = final_weights(products, row_top, scale)
        if least is not None:
            weights.masked_fill_(weights < least[:, None], 0.0)
        weights = scratch.cast("rounded", weights, narrow)
        _store_product(grad_memory_value[chunk], weights.mT, grad_out, scratch)
        grad_logits = product("grad_logits", shifted_grad_out, values.mT, scratch, scale).mul_(weights)
        if grad_bias is not None:
            torch.sum(grad_logits, 0, dtype=wide, out=grad_bias[chunk]).div_(scale)
        _store_product(grad_memory_key[chunk], grad_logits.mT, query_key, scratch)
        _add_product(total, grad_logits, keys, scratch)
    return total


def row_top_parts(lse: Tensor, scale: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The log-sum-exp `[M]`, float64, in the unit of the unscaled products: rounded, `[M, 1]`, and the rounding error.

    In two parts, since the rounding error would scale the whole row. A row with no visible key gets a top so high that
    all its weights are 0.
    """
    row_top = (lse.masked_fill(lse.isneginf(), -MIN_ROW_MAX) / scale)[:, None]
    rounded = row_top.to(wide)
    return rounded, ((rounded - row_top) * (scale * LOG2_E)).to(wide)


def final_weights(products: Tensor, row_top: Sequence[Tensor], scale: float) -> Tensor:
    """The unscaled products `[M, N]` turned into weights, in place."""
    rounded, rest = row_top
    return power_of_two(torch.add(rest, products.sub_(rounded), alpha=scale * LOG2_E, out=products))


def power_of_two(exponents: Tensor) -> Tensor:
    """2 to the power of each, in place; 0 where that is next to nothing."""
    return torch.threshold_(exponents, MIN_EXPONENT, -math.inf).exp2_()


def _beside(matrix: Tensor, column: Tensor | None, joined: Tensor) -> Tensor:
    """Fill `joined` `[R, K + 2]` with the matrix and a column in two parts, rounded and its rounding error.

    Without a column the two parts are ones: the product of two such matrices adds the column of the one to every column
    of the result before it is rounded.
    """
    joined[:, :-2] = matrix
    if column is None:
        joined[:, -2:] = 1.0
    else:
        joined[:, -2] = column
        joined[:, -1] = column - joined[:, -2]
    return joined


def _add_product(total: Tensor, left: Tensor, right: Tensor, scratch: Scratch) -> None:
    """`total += left · right`; a narrow product is rounded, the total never."""
    if left.dtype == total.dtype and not by_onednn(left, right):
        total.addmm_(left, right)
    else:
        total.add_(scratch.cast("widened", product("product", left, right, scratch), total.dtype))


def _store_product(target: Tensor, left: Tensor, right: Tensor, scratch: Scratch) -> None:
    """`target = left · right`, through a buffer if the product has another dtype."""
    if left.dtype == target.dtype and not by_onednn(left, right):
        torch.mm(left, right, out=target)
    else:
        target.copy_(product("product", left, right, scratch))
