"""What every read means: the space-time memory read in naive PyTorch, in any dtype. The truth of the tests."""

import math

import torch
from torch import Tensor


def reference_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    scale: float,
    similarity: str = "dot",
    key_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Read the memory by holding the whole affinity, computed in the dtype of the inputs.

    Args:
        query_key: `[B, M, C]`, any floating dtype.
        memory_key: `[B, N, C]`, same dtype; N = 0 is an empty memory.
        memory_value: `[B, N, V]`, same dtype.
        scale: factor of the similarity, before the softmax.
        similarity: "dot", or "l2" for the negative squared distance.
        key_bias: `[B, N]`, added to the logits; -inf hides a position.
        lengths: `[B]`, how many positions each memory has; None is N.
        top_k: weigh only the so many best positions of a query; ties go to the lower index.

    Returns:
        The read `[B, M, V]` in the dtype of the inputs and the natural log of the summed exponentials `[B, M]` in
        float32 (float64 for float64 inputs). A query with no visible key reads zeros, with a log-sum-exp of -inf.

    Source: Oh et al. 2019, Space-Time Memory Networks, equation 1; the scale is the released code's. "l2": Cheng et al.
    2021, Rethinking Space-Time Networks, section 4.
    """
    logits_BMN = reference_logits(query_key, memory_key, scale, similarity, key_bias, lengths)
    weights_BMN, lse_BM = _softmax(logits_BMN, top_k)
    # 0 · NaN is NaN
    memory_value = memory_value.masked_fill(_hidden(memory_value, key_bias, lengths)[:, :, None], 0.0)
    return weights_BMN @ memory_value, lse_BM


def reference_usage(
    query_key: Tensor,
    memory_key: Tensor,
    scale: float,
    similarity: str = "dot",
    key_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    top_k: int | None = None,
    lse: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The softmax mass of each memory position over all queries: the column sums `[B, N]` of the affinity.

    Args:
        query_key, memory_key, scale, similarity, key_bias, lengths, top_k: as in `reference_read`.
        lse: `[B, M]`, the log-sum-exp of a larger memory, of which these positions are a part; None is these alone.
        weight: `[B, M]`, what each query counts; None is 1.
    """
    logits_BMN = reference_logits(query_key, memory_key, scale, similarity, key_bias, lengths)
    weights_BMN, _ = _softmax(logits_BMN, top_k)
    if lse is not None:
        weights_BMN = (logits_BMN - lse.masked_fill(lse.isneginf(), 0.0)[:, :, None]).exp().to(logits_BMN.dtype)
    wide = weights_BMN if weights_BMN.itemsize == 8 else weights_BMN.float()
    return (wide if weight is None else wide * weight[:, :, None]).sum(1)


def reference_logits(
    query_key: Tensor,
    memory_key: Tensor,
    scale: float,
    similarity: str = "dot",
    key_bias: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The logits `[B, M, N]`, in the dtype of the keys; the arguments are those of `reference_read`."""
    hidden_BN = _hidden(memory_key, key_bias, lengths)
    # not only the logits: a gradient of 0 · NaN is NaN
    memory_key = memory_key.masked_fill(hidden_BN[:, :, None], 0.0)
    logits_BMN = query_key @ memory_key.mT
    if similarity == "l2":
        query_square = query_key.square().sum(2)[:, :, None]
        logits_BMN = 2 * logits_BMN - memory_key.square().sum(2)[:, None] - query_square
    logits_BMN = logits_BMN * scale
    if key_bias is not None:
        logits_BMN = logits_BMN + key_bias[:, None].to(logits_BMN.dtype)
    return logits_BMN.masked_fill(hidden_BN[:, None], -math.inf)


def _hidden(memory: Tensor, key_bias: Tensor | None, lengths: Tensor | None) -> Tensor:
    """`[B, N]`, true where a bias of -inf stands, and from the end of a memory on."""
    hidden_BN = torch.zeros(memory.shape[:2], dtype=torch.bool, device=memory.device)
    if key_bias is not None:
        hidden_BN = key_bias.isneginf()
    if lengths is not None:
        hidden_BN = hidden_BN | (torch.arange(memory.shape[1], device=lengths.device) >= lengths[:, None])
    return hidden_BN


def _softmax(logits_BMN: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """The affinity and its log-sum-exp; rows with no visible key are 0 and -inf, without a gradient."""
    if top_k is not None:
        best = logits_BMN.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        others = torch.ones_like(logits_BMN, dtype=torch.bool).scatter_(-1, best, False)
        logits_BMN = logits_BMN.masked_fill(others, -math.inf)
    empty = logits_BMN.isneginf().all(-1, keepdim=True)
    logits_BMN = logits_BMN.masked_fill(empty, 0.0)
    wide = logits_BMN if logits_BMN.itemsize == 8 else logits_BMN.float()
    lse_BM = wide.logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    return logits_BMN.softmax(-1).masked_fill(empty, 0.0), lse_BM
