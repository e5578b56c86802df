"""Who reads in bench/gpu.py: ours with any tiles, and what else computes the same in one call; how a call is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.harness import Result
from bench.read import naive_read
from stm_kernels import memory_read

# block_m, block_n, block_v, warps, stages
INTERPRETED_TILES = [(64, 32, 64, 4, 1), (32, 64, 16, 4, 1)]
WIDE_TILES = [(32, 32, 64, 4, 1), (64, 32, 64, 8, 1), (32, 64, 128, 8, 1), (64, 32, 128, 16, 1)]
NARROW_TILES = [
    *[(128, 64, 256, 8, 2), (128, 64, 256, 8, 3), (128, 32, 256, 8, 3), (128, 64, 128, 8, 3), (128, 128, 128, 8, 2)],
    *[(64, 64, 256, 8, 2), (64, 64, 256, 4, 2), (64, 64, 512, 8, 2), (64, 64, 128, 4, 3), (64, 128, 128, 4, 2)],
]
TMA_TILES = {
    "descriptor": [(128, 64, 256, 8, 3), (128, 64, 256, 8, 2), (128, 128, 128, 8, 2), *NARROW_TILES[-5:]],
    "warp-specialized": [(128, 64, 256, 4, 2), (128, 64, 256, 4, 3), (128, 64, 128, 4, 3)],
}
# block_m, block_n, block_k, warps, stages
BACKWARD_TILES = {
    "interpreted": [(64, 32, 32, 4, 1), (32, 64, 16, 4, 1)],
    "wide": [(64, 64, 32, 8, 1), (64, 32, 16, 4, 1), (32, 64, 16, 4, 1)],
    "narrow": [(128, 128, 64, 8, 2), (128, 128, 32, 8, 4), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3)],
}


def by_heads(backend: SDPBackend, query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> Tensor:
    """PyTorch's attention that needs keys and values of one width: slices of the values as heads, the affinity of each
    anew.
    """
    C, heads = query_key.shape[2], memory_value.shape[2] // query_key.shape[2]
    query_key, memory_key = (keys[:, None].expand(-1, heads, -1, -1) for keys in (query_key, memory_key))
    values = rearrange(memory_value, "b n (h v) -> b h n v", v=C)
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(query_key, memory_key, values, scale=scale)
    return rearrange(out, "b h m v -> b m (h v)")


def memory_efficient(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> Tensor:
    """PyTorch's memory-efficient attention, which takes values wider than keys."""
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = scaled_dot_product_attention(query_key[:, None], memory_key[:, None], memory_value[:, None], scale=scale)
    return out[:, 0]


@lru_cache(maxsize=1)
def compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.cache_size_limit = 256
    return torch.compile(flex_attention, dynamic=False)


def flex(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float) -> Tensor:
    """FlexAttention with a tile that does not spill at 512 value channels."""
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    tensors = (query_key[:, None], memory_key[:, None], memory_value[:, None])
    return compiled_flex_attention()(*tensors, scale=scale, kernel_options=tile)[:, 0]


READERS: dict[str, Callable[..., Tensor]] = {
    "ours": partial(memory_read, implementation="triton"),
    "naive": naive_read,
    "cuDNN, heads": partial(by_heads, SDPBackend.CUDNN_ATTENTION),
    "flash, heads": partial(by_heads, SDPBackend.FLASH_ATTENTION),
    "memory-efficient": memory_efficient,
    # takes long to compile
    "FlexAttention": flex,
}
"""By the name they have in tables; each is checked before its time counts."""


def timed(call: Callable[[], object], device: torch.device | str) -> Result:
    """Median and quartiles of a call's seconds, on a GPU of 0.2 s by its own clock, its cache emptied before each."""
    if torch.device(device).type == "cuda":
        from triton.testing import do_bench

        times = [milliseconds / 1e3 for milliseconds in do_bench(call, rep=200, return_mode="all")]
    else:
        # an interpreted kernel is not worth more than two calls
        times = []
        for _ in range(2):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    low, middle, high = map(float, np.percentile(times, [25, 50, 75]))
    return {"seconds": middle, "quartiles": [low, high], "repeats": len(times)}


def tiles_of(device: torch.device | str, dtype: torch.dtype, C: int, V: int) -> list[Any]:
    """Tiles of the read worth measuring, the default first."""
    from stm_kernels.gpu.launch import architecture_of
    from stm_kernels.gpu.tuning import TMA_ARCHITECTURES, ForwardTiles, forward_tiles, padded

    device = torch.device(device)
    architecture = architecture_of(device)
    kinds = {"portable": INTERPRETED_TILES if device.type == "cpu" else WIDE_TILES}
    if device.type != "cpu" and dtype != torch.float32:
        kinds = {"portable": NARROW_TILES} | (TMA_TILES if architecture in TMA_ARCHITECTURES else {})
    others = [
        ForwardTiles(m, n, min(v, padded(V)), warps, stages, kind)
        for kind, shapes in kinds.items()
        for m, n, v, warps, stages in shapes
    ]
    return list(dict.fromkeys([forward_tiles(architecture, dtype, C, V, descriptors=True), *others]))


def backward_tiles_of(device: torch.device | str, dtype: torch.dtype, C: int) -> list[Any]:
    """Tiles of the backward worth measuring, the default first."""
    from stm_kernels.gpu.launch import architecture_of
    from stm_kernels.gpu.tuning import affinity_tiles

    device = torch.device(device)
    default = affinity_tiles(architecture_of(device), dtype, C)
    kind = "interpreted" if device.type == "cpu" else "wide" if dtype == torch.float32 else "narrow"
    names = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    others = [replace(default, **dict(zip(names, tile))) for tile in BACKWARD_TILES[kind]]
    return list(dict.fromkeys([default, *others]))


@contextmanager
def chosen(forward: Any = None, backward: Any = None, positions_per_split: int = 0) -> Iterator[None]:
    """Triton reads meanwhile have these tiles, and split their memory so; None and 0 leave it to the defaults."""
    import stm_kernels.gpu.backward as backward_module
    import stm_kernels.gpu.forward as forward_module

    def splits(tiles: Any, B: int, M: int, N: int, *_: int) -> tuple[int, int]:
        size = -(-positions_per_split // tiles.block_n) * tiles.block_n
        return -(-N // size), size

    with ExitStack() as stack:
        if forward is not None:
            stack.enter_context(mock.patch.object(forward_module, "forward_tiles", lambda *_, **__: forward))
            stack.enter_context(mock.patch.object(forward_module, "staged_is_cheaper", lambda *_: False))
        if backward is not None:
            stack.enter_context(mock.patch.object(backward_module, "affinity_tiles", lambda *_, **__: backward))
        if positions_per_split:
            stack.enter_context(mock.patch.object(forward_module, "forward_splits", splits))
        yield
