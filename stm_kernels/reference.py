"""What every read means: the space-time memory read in naive PyTorch, in any dtype. The truth of the tests."""

from torch import Tensor


def reference_read(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Read the memory by holding the whole affinity, computed in the dtype of the inputs.

    Args:
        query_key: `[B, M, C]`, any floating dtype.
        memory_key: `[B, N, C]`, same dtype; N = 0 is an empty memory.
        memory_value: `[B, N, V]`, same dtype.
        scale: factor of the dot product, before the softmax.

    Returns:
        The read `[B, M, V]` in the dtype of the inputs and the natural log of the summed exponentials `[B, M]` in
        float32 (float64 for float64 inputs). An empty memory reads zeros, with a log-sum-exp of -inf.

    Source: Oh et al. 2019, Space-Time Memory Networks, equation 1; the scale is the released code's.
    """
    logits_BMN = query_key @ memory_key.mT * scale
    wide = logits_BMN if logits_BMN.itemsize == 8 else logits_BMN.float()
    return logits_BMN.softmax(-1) @ memory_value, wide.logsumexp(-1)
