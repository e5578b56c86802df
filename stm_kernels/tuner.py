"""Measure tiles on this GPU and keep the best: what the default tiles are for a GPU nobody has measured yet."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from stm_kernels.affinity import Affinity
from stm_kernels.testing import Problem, Read, draw_problem, error_ratios, sample_of
from stm_kernels.timing import call_seconds

# a gradient by a memory position depends on every query: a tile of the backward is judged on a memory that can be known
JUDGED_POSITIONS = 4096


@dataclass(frozen=True)
class Measurement:
    """What came of one candidate."""

    tiles: Any
    """`ForwardTiles` or `AffinityTiles`."""
    seconds: float | None
    """Median of one call; None where it did not run or erred."""
    reason: str = ""
    """Why there is no time."""


def tune(
    queries: int,
    positions: int,
    *,
    batch: int = 1,
    key_channels: int = 128,
    value_channels: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    skip: float = 0.0,
    channel_major: bool = False,
    backward: bool = False,
    seconds: float = 0.1,
) -> list[Measurement]:
    """Measure the tiles of a read on this GPU, print the times, and keep the best for later reads of about that size.

    What is kept lies in `$XDG_CACHE_HOME/stm-kernels/tiles.json`, or under `~/.cache`. Later processes look it up; it
    holds for the GPU's architecture, the dtype, the channels, this version, and sizes up to a factor of two.

    Args:
        queries: M.
        positions: N.
        batch: B.
        key_channels: C.
        value_channels: V.
        dtype: of keys and values.
        device: a GPU.
        skip: as in `memory_read`; reads that skip have tiles of their own.
        channel_major: keys and values lie as convolutions leave them, `[B, C, N]` in memory: other tiles may be best.
        backward: tune the backward pass instead.
        seconds: to measure each candidate for.

    Returns:
        Every candidate, the fastest first; those that erred or did not run last.

    Raises:
        ValueError: a size is not positive, or no kernel runs on that device in that dtype.
        RuntimeError: no candidate both ran and was right; nothing is kept.
        OSError: the file cannot be written.
    """
    sizes = (batch, queries, positions, key_channels, value_channels)
    device = _checked(sizes, dtype, torch.device(device))
    from stm_kernels.gpu.launch import architecture_of
    from stm_kernels.gpu.stored import backward_name, read_name, store_tiles, tiles_key
    from stm_kernels.gpu.tma import has_descriptors

    architecture = architecture_of(device)
    problem = draw_problem(*sizes, dtype=dtype, device=device, tracked=skip > 0, channel_major=channel_major)
    if backward:
        measure, kernel = _backward_measure(problem, skip, seconds), backward_name(skip > 0)
        candidates = affinity_candidates(architecture, dtype, key_channels, skip > 0)
    else:
        descriptors = has_descriptors(problem.query_key, problem.memory_key, problem.memory_value)
        measure, kernel = _forward_measure(problem, skip, seconds), read_name(skip > 0, descriptors)
        candidates = forward_candidates(architecture, dtype, key_channels, value_channels, skip > 0, descriptors)
    found = [_report(measure(tiles)) for tiles in candidates]
    if not backward:
        fastest = min(found, key=_seconds)
        found += [_report(measure(tiles)) for tiles in _other_splits(fastest.tiles, sizes, device)]
    found.sort(key=_seconds)
    if found[0].seconds is None:
        raise RuntimeError(f"no tile ran and was right; the default said: {found[0].reason}")
    key = tiles_key(kernel, architecture, dtype, batch * queries, positions, key_channels, value_channels)
    print(f"kept in {store_tiles(found[0].tiles, key)}: {_named(found[0].tiles)}", flush=True)
    return found


def forward_candidates(
    architecture: str, dtype: torch.dtype, C: int, V: int, skips: bool = False, descriptors: bool = False
) -> list[Any]:
    """Tiles of the read worth measuring, the default first; arguments as in `forward_tiles`."""
    from stm_kernels.gpu.launch import INTERPRETER
    from stm_kernels.gpu.tuning import COPY_ENGINES, ForwardTiles, forward_tiles, padded

    default = forward_tiles(architecture, dtype, C, V, skips=skips, descriptors=descriptors)
    fetched: dict[str, list[tuple[int, int, int, int, int]]] = {}
    if architecture == INTERPRETER:
        shapes = [(64, 32, 64, 4, 1), (32, 64, 16, 4, 1)]
    elif dtype == torch.float32:
        shapes = [(32, 32, 64, 4, 1), (64, 32, 64, 8, 1), (32, 64, 128, 8, 1), (64, 32, 128, 16, 1)]
    else:
        shapes = [
            (128, 64, 256, 8, 2),
            (128, 32, 256, 8, 3),
            (128, 64, 128, 8, 3),
            (128, 128, 128, 8, 2),
            (64, 64, 256, 8, 2),
            (64, 64, 256, 4, 2),
            (64, 64, 512, 8, 2),
            (64, 32, 512, 8, 2),
            (64, 64, 128, 4, 3),
            (64, 128, 128, 4, 2),
        ]
        if descriptors and not skips and architecture in COPY_ENGINES:
            fetched["descriptor"] = [(128, 64, 256, 8, 3), (128, 64, 256, 8, 2), (128, 128, 128, 8, 2), *shapes[-5:]]
            fetched["warp-specialized"] = [(128, 64, 256, 4, 2), (128, 64, 256, 4, 3), (128, 64, 128, 4, 3)]
            shapes.insert(0, (128, 64, 256, 8, 3))
    others = [
        ForwardTiles(m, n, min(v, padded(V)), warps, stages, kind)
        for kind, shapes in {"portable": shapes, **fetched}.items()
        for m, n, v, warps, stages in shapes
    ]
    return list(dict.fromkeys([default, *others]))


def affinity_candidates(architecture: str, dtype: torch.dtype, C: int, skips: bool = False) -> list[Any]:
    """Tiles of the backward worth measuring, the default first."""
    from stm_kernels.gpu.launch import INTERPRETER
    from stm_kernels.gpu.tuning import affinity_tiles

    default = affinity_tiles(architecture, dtype, C, skips=skips)
    if architecture == INTERPRETER:
        shapes = [(64, 32, 32, 4, 1), (32, 64, 16, 4, 1)]
    elif dtype == torch.float32:
        shapes = [(64, 64, 32, 8, 1), (64, 32, 16, 4, 1), (32, 64, 16, 4, 1)]
    else:
        shapes = [
            (128, 128, 64, 8, 2),
            (128, 128, 64, 8, 4),
            (128, 128, 32, 8, 4),
            (128, 64, 64, 4, 3),
            (64, 128, 64, 4, 3),
            (128, 256, 64, 8, 3),
        ]
    others = [
        replace(default, block_m=m, block_n=n, block_k=k, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in shapes
    ]
    return list(dict.fromkeys([default, *others]))


def read_with(forward: Any = None, backward: Any = None, skip: float = 0.0) -> Read:
    """The Triton read with given tiles, as a function of a problem's tensors; None chooses as always."""
    from stm_kernels.gpu.backward import triton_read_backward
    from stm_kernels.gpu.forward import triton_read

    class TiledRead(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query_key, memory_key, memory_value, scale, key_bias, lengths):
            affinity = Affinity(query_key, memory_key, scale, key_bias, lengths)
            out, lse, skipped, kept = triton_read(affinity, memory_value, skip, tiles=forward)
            ctx.affinity, ctx.rest = affinity, (memory_value, out, lse, skipped, kept)
            return out, lse if out.dtype == torch.float64 else lse.float(), skipped

        @staticmethod
        def backward(ctx, grad_out, grad_lse, _):
            grads = triton_read_backward(grad_out, grad_lse, ctx.affinity, *ctx.rest, backward)
            return *grads[:3], None, grads[3], None

    def read(
        query_key: Tensor,
        memory_key: Tensor,
        memory_value: Tensor,
        *,
        scale: float,
        key_bias: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        return TiledRead.apply(query_key, memory_key, memory_value, scale, key_bias, lengths)

    return read


def wrong(ratios: dict[str, float]) -> str:
    """What a read errs in, in words; nothing where it keeps to its allowed error."""
    errors = {name: round(ratio, 2) for name, ratio in ratios.items() if not ratio <= 1}
    return f"error over allowed error: {errors}" if errors else ""


def _forward_measure(problem: Problem, skip: float, seconds: float) -> Callable[[Any], Measurement]:
    inputs, device = (problem.query_key, problem.memory_key, problem.memory_value), problem.query_key.device
    sample = sample_of(problem)
    slack = 2 * skip * problem.memory_value.abs().max().item()

    def measure(tiles: Any) -> Measurement:
        read = read_with(tiles, skip=skip)
        return _attempt(
            tiles,
            lambda: sample.ratios(dict(zip(("out", "lse"), read(*inputs, **problem.options()))), slack),
            lambda: call_seconds([lambda: read(*inputs, **problem.options())], device, seconds),
        )

    return measure


def _backward_measure(problem: Problem, skip: float, seconds: float) -> Callable[[Any], Measurement]:
    device = problem.query_key.device
    few = slice(0, JUDGED_POSITIONS)
    judged = replace(problem, memory_key=problem.memory_key[:, few], memory_value=problem.memory_value[:, few])
    inputs = [getattr(problem, name).detach().requires_grad_() for name in ("query_key", "memory_key", "memory_value")]

    def measure(tiles: Any) -> Measurement:
        def time() -> list[float]:
            out, lse, _ = read_with(backward=tiles, skip=skip)(*inputs, **problem.options())
            grads = [problem.grad_out, problem.grad_lse]
            call = lambda: torch.autograd.grad([out, lse], inputs, grads, retain_graph=True)  # noqa: E731
            return call_seconds([call], device, seconds)

        # what skipping does to a gradient is no error of a tile: one that is right without is judged with it
        return _attempt(tiles, lambda: error_ratios(judged, read_with(backward=tiles)), time)

    return measure


def _attempt(
    tiles: Any, judge: Callable[[], dict[str, float]], time: Callable[[], list[float]]
) -> Measurement:  # fmt: skip
    """Time a candidate that is right; one that Triton refuses is no reason to stop."""
    try:
        error = wrong(judge())
        return Measurement(tiles, None, error) if error else Measurement(tiles, statistics.median(time()))
    except Exception as failure:
        return Measurement(tiles, None, f"{type(failure).__name__}: {failure}".splitlines()[0])


def _other_splits(tiles: Any, sizes: tuple[int, ...], device: torch.device) -> list[Any]:
    """The same tiles with more and with fewer parts of the memory than `forward_splits` would take."""
    from stm_kernels.gpu.launch import multiprocessors
    from stm_kernels.gpu.tuning import forward_splits

    batch, queries, positions, _, value_channels = sizes
    chosen, _ = forward_splits(tiles, batch, queries, positions, value_channels, multiprocessors(device))
    counts = {chosen // 2, chosen - 1, chosen + 1, chosen * 2} - {0, chosen}
    return [replace(tiles, splits=count) for count in sorted(counts)]


def _checked(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.device:
    names = ("batch", "queries", "positions", "key_channels", "value_channels")
    for name, size in zip(names, sizes):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        raise ValueError(f"device: expected a GPU, got {device}")
    dtypes = (torch.float16, torch.float32) if interpreted else (torch.bfloat16, torch.float16, torch.float32)
    if dtype not in dtypes:
        raise ValueError(f"dtype: expected {' or '.join(map(str, dtypes))} on {device}, got {dtype}")
    return device


def _seconds(measurement: Measurement) -> float:
    return float("inf") if measurement.seconds is None else measurement.seconds


def _named(tiles: Any) -> str:
    return " ".join(f"{field.name}={value}" for field, value in zip(fields(tiles), astuple(tiles)))


def _report(measurement: Measurement) -> Measurement:
    time = "        –" if measurement.seconds is None else f"{measurement.seconds * 1e6:9.1f} µs"
    print(f"{time}  {_named(measurement.tiles)}  {measurement.reason}", flush=True)
    return measurement
