"""Who reads in bench/gpu.py: ours, and what else computes the same in one call; and how a call is timed there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from stm_kernels import memory_read

Read = Callable[..., tuple[Tensor, ...]]

OURS = "ours"
NAIVE = "naive"
FLEX = "FlexAttention"
SLOW_TO_COMPILE = (FLEX,)


def ours(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The read of this package."""
    return memory_read(query_key, memory_key, memory_value, scale=scale, return_lse=True, implementation="triton")


def naive(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> tuple[Tensor]:
    """What public STM code computes: the whole affinity."""
    return (torch.softmax(query_key @ memory_key.mT * scale, -1) @ memory_value,)


def _by_heads(backend: SDPBackend) -> Read:
    """Attention that needs keys and values of one width: slices of the values as heads, exact, the affinity of each
    anew.
    """

    def read(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> tuple[Tensor]:
        C, heads = query_key.shape[2], memory_value.shape[2] // query_key.shape[2]
        query_key, memory_key = (keys[:, None].expand(-1, heads, -1, -1) for keys in (query_key, memory_key))
        values = rearrange(memory_value, "b n (h v) -> b h n v", v=C)
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(query_key, memory_key, values, scale=scale)
        return (rearrange(out, "b h m v -> b m (h v)"),)

    return read


def memory_efficient(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> tuple[Tensor]:
    """PyTorch's memory-efficient attention, which takes values wider than keys."""
    _need_gpu(query_key)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = scaled_dot_product_attention(query_key[:, None], memory_key[:, None], memory_value[:, None], scale=scale)
    return (out[:, 0],)


def cudnn(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> tuple[Tensor]:
    """cuDNN's attention through PyTorch."""
    _need_gpu(query_key)
    return _by_heads(SDPBackend.CUDNN_ATTENTION)(query_key, memory_key, memory_value, scale)


@lru_cache(maxsize=1)
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.cache_size_limit = 256
    return torch.compile(flex_attention, dynamic=False)


def flex(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> tuple[Tensor]:
    """FlexAttention with a tile that does not spill at 512 value channels."""
    _need_gpu(query_key)
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    tensors = (query_key[:, None], memory_key[:, None], memory_value[:, None])
    return (_compiled_flex_attention()(*tensors, scale=scale, kernel_options=tile)[:, 0],)


def xformers(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> tuple[Tensor]:
    """xFormers' memory-efficient attention, where installed."""
    from xformers.ops import memory_efficient_attention

    tensors = (query_key[:, :, None], memory_key[:, :, None], memory_value[:, :, None])
    return (memory_efficient_attention(*tensors, scale=scale)[:, :, 0],)


def flash_attention_3(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> tuple[Tensor]:
    """FlashAttention-3, where built: four heads of 128 channels."""
    from flash_attn_interface import flash_attn_func

    return (_flash(flash_attn_func, query_key, memory_key, memory_value, scale, 128),)


def flash_attention_4(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> tuple[Tensor]:
    """FlashAttention-4, where installed: two heads of 256 value channels."""
    from flash_attn.cute import flash_attn_func

    return (_flash(flash_attn_func, query_key, memory_key, memory_value, scale, 256),)


def _flash(
    function: Callable, query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float, width: int
) -> Tensor:
    heads = memory_value.shape[2] // width
    query_key, memory_key = (keys[:, :, None].expand(-1, -1, heads, -1) for keys in (query_key, memory_key))
    out = function(query_key, memory_key, memory_value.unflatten(-1, (heads, width)), softmax_scale=scale)
    return (out if isinstance(out, Tensor) else out[0]).flatten(2)


def _need_gpu(tensor: Tensor) -> None:
    if not tensor.is_cuda:
        raise RuntimeError("needs a GPU")


PEERS: dict[str, Read] = {
    OURS: ours,
    NAIVE: naive,
    "cuDNN, heads": cudnn,
    "flash, heads": _by_heads(SDPBackend.FLASH_ATTENTION),
    "memory-efficient": memory_efficient,
    FLEX: flex,
    "FlashAttention-3": flash_attention_3,
    "FlashAttention-4": flash_attention_4,
    "xFormers": xformers,
}
"""Readers by the name they have in tables; each is checked before its time counts."""


def call_seconds(
    calls: Sequence[Callable[[], Any]], device: torch.device, seconds: float = 0.2, least: int = 5, most: int = 200
) -> list[float]:
    """Seconds of one call by the device's own clock, without the gaps between launches, a number for each repeat.

    Args:
        calls: the same call, on inputs of its own each; they take turns, so that no cache holds what they read.
        device: what to wait for.
        seconds: for all repeats together; at least `least` are made, and at most `most`.
    """
    if device.type != "cuda":
        calls[0]()
        found: list[float] = []
        while len(found) < least or (sum(found) < seconds and len(found) < most):
            start = time.perf_counter()
            calls[len(found) % len(calls)]()
            found.append(time.perf_counter() - start)
        return found
    for call in calls:
        call()
    estimate = _by_events(lambda: [call() for call in calls], 2)[-1] / len(calls)
    # a short call is replayed from a graph, which lasts a millisecond: launching it would take longer than running it
    rounds = max(1, round(1e-3 / (estimate * len(calls))))
    turn = _graph(list(calls) * rounds) if estimate < 2e-3 else None
    if turn is None:
        rounds, turn = 1, lambda: [call() for call in calls]
    count = len(calls) * rounds
    repeats = min(most, max(least, round(seconds / (estimate * count))))
    return [one / count for one in _by_events(turn, repeats)]


def _by_events(turn: Callable[[], Any], repeats: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        turn()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _graph(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any] | None:
    """All calls as one graph to replay; None where one of them cannot be recorded."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay
