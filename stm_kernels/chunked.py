"""The read in plain PyTorch, one chunk of keys at a time: the CPU implementation."""

import torch
from torch import Tensor

CHUNK = 1024


def chunked_read(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Read by an online softmax over chunks of keys. Arguments and results as in `reference_read`."""
    wide = torch.float64 if query_key.dtype == torch.float64 else torch.float32
    query_key_wide = query_key.to(wide) * scale
    batch, queries, _ = query_key.shape
    out = query_key.new_zeros(batch, queries, memory_value.shape[-1], dtype=wide)
    lse = query_key.new_full((batch, queries), float("-inf"), dtype=wide)
    for keys, values in zip(memory_key.split(CHUNK, 1), memory_value.split(CHUNK, 1)):
        logits = query_key_wide @ keys.mT.to(wide)
        new_lse = torch.logaddexp(lse, logits.logsumexp(-1))
        part = (logits - new_lse[..., None]).exp() @ values.to(wide)
        out = out * (lse - new_lse).exp()[..., None] + part
        lse = new_lse
    return out.to(query_key.dtype), lse
