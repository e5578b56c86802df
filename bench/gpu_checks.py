"""Whether every variant of the read is right on a device: part of bench/gpu.py.

Against float64, by the yardstick of `stm_kernels.testing`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.harness import Result, Task
from bench.problems import draw_problem, sample_of
from stm_kernels import PagedMemory, memory_usage, merge_reads
from stm_kernels.affinity import SKIP_POSITIONS, SKIP_QUERIES
from stm_kernels.operator import read_operator
from stm_kernels.reference import reference_logits, reference_usage
from stm_kernels.testing import (
    Problem,
    allowed_error_shares,
    assert_bounded,
    error_ratios,
    make_problem,
    make_tie_problem,
    read_by,
    results,
)

Ratios = dict[str, float]
RANDOM_SHAPES, RANDOM_TASKS, RANDOM_SECONDS = 1000, 8, 60.0
# every pair of channel counts is a compilation: few pairs, of all kinds
RANDOM_CHANNELS = ((16, 16), (20, 33), (64, 96), (128, 512), (100, 70))
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


def check_tasks(device: torch.device, tiny: bool) -> dict[str, Task]:
    """Every check by name, those of the dtype that matters most first; `tiny` where a kernel is interpreted."""
    checks = {f"{name_of(dtype)}: {name}": check for dtype in dtypes_of(device)
              for name, check in _checks(device, dtype, tiny).items()}  # fmt: skip
    if device.type == "cuda" and not tiny:
        checks["float16: B·N·V beyond 2^31, gradients"] = partial(_huge_gradients, device)
        checks["bfloat16: B·N·V beyond 2^31"] = partial(_huge, device)
    return {name: partial(_judge, check) for name, check in checks.items()}


def random_tasks(device: torch.device, tiny: bool, seed: int) -> dict[str, Task]:
    """Random shapes, in parts that run side by side."""
    total, parts = (8, 2) if tiny else (RANDOM_SHAPES, RANDOM_TASKS)
    return {
        f"random shapes, part {part + 1} of {parts}": partial(_random_shapes, device, tiny, seed + part, total // parts)
        for part in range(parts)
    }


def dtypes_of(device: torch.device) -> list[torch.dtype]:
    """The one that matters most first; the interpreter has no bfloat16."""
    return [torch.bfloat16] * (device.type == "cuda") + [torch.float16, torch.float32]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wrong(ratios: Ratios) -> str:
    """What a read errs in, in words; nothing where it keeps to its allowed error."""
    errors = {name: round(ratio, 2) for name, ratio in ratios.items() if not ratio <= 1}
    return f"error over allowed error: {errors}" if errors else ""


def _judge(check: Callable[[], Ratios]) -> Result:
    ratios = check()
    reason = wrong(ratios)
    return {"failed": reason} if reason else {"error_over_allowed": max(ratios.values())}


def _checks(device: torch.device, dtype: torch.dtype, tiny: bool) -> dict[str, Callable[[], Ratios]]:
    read, kind = read_by("triton"), {"dtype": dtype, "device": device}
    # a scale that is no power of two: one would spare plain PyTorch a rounding
    sizes = (2, 66, 150, 24, 48) if tiny else (2, 1620, 3300, 128, 512)
    odd = (1, 33, 70, 20, 33) if tiny else (3, 131, 517, 100, 300)
    ties = (1, 40, 90, 64, 40)

    def make(shape: tuple[int, ...] = sizes, **form: Any) -> Problem:
        return make_problem(*shape, **kind, **form)

    problems: dict[str, Callable[[], Problem]] = {
        "read and backward": make,
        "peaked": partial(make, peak=5.0),
        "channel-major": partial(make, channel_major=True),
        "odd sizes": partial(make, odd),
        "logits of 10^4": lambda: make_tie_problem(*(ties if tiny else (1, 300, 900, 64, 40)), **kind),
        "bias, lengths, hidden positions": partial(make, odd, biased=True, ragged=True),
        "squared distance": partial(make, odd, similarity="l2"),
        "values of many objects": partial(make, (1, 33, 70, 16, 6 * 64) if tiny else (1, 700, 2100, 128, 3 * 512)),
        "overlapping strides": lambda: _overlapping(make(odd)),
        "top-k": lambda: replace(make(odd), top_k=7),
        "top-k of more than there are": lambda: replace(make((1, 40, 20, 16, 24)), top_k=30),
        "top-k among equals": lambda: replace(make_tie_problem(*ties, **kind), top_k=7),
    }
    checks: dict[str, Callable[[], Ratios]] = {
        name: lambda problem=problem: error_ratios(problem(), read) for name, problem in problems.items()
    }
    checks |= {
        "one position": lambda: _one_position(make((2, 40, 1, 16, 24))),
        "backward in chunks": lambda: _in_chunks(make(odd)),
        "skip": lambda: skip_ratios(draw_problem(*sizes, **kind, tracked=True), 1e-3),
        "skip much": lambda: skip_ratios(make(odd, peak=4.0), 0.2),
        "usage": lambda: _usage(make()),
        "usage of the best": lambda: _usage(make(odd), 7),
        "paged": lambda: _paged(make(odd)),
        "merge": lambda: _merge(make(odd)),
        "equal bits from run to run": lambda: _repeated(make()),
    }
    for splits in (2, 3, 64):
        checks[f"{splits} splits"] = lambda splits=splits: _with_splits(make(odd), splits)
    # channels of whole 16 bytes: tiles that need descriptors get them
    whole = (*odd[:3], odd[3] // 8 * 8, odd[4] // 8 * 8)
    for index in range(1, len(tiles_of(device, dtype, *whole[3:]))):
        checks[f"tile {index}"] = lambda index=index: _with_tiles(make(whole), index, "forward")
    for index in range(1, len(backward_tiles_of(device, dtype, odd[3]))):
        checks[f"backward tile {index}"] = lambda index=index: _with_tiles(make(odd), index, "backward")
    return checks


def _architecture(device: torch.device) -> str:
    from stm_kernels.gpu.launch import architecture_of

    return architecture_of(device)


def tiles_of(device: torch.device, dtype: torch.dtype, C: int, V: int) -> list[Any]:
    """Tiles of the read worth measuring, the default first."""
    from stm_kernels.gpu.tuning import TMA_ARCHITECTURES, ForwardTiles, forward_tiles, padded

    architecture = _architecture(device)
    default = forward_tiles(architecture, dtype, C, V, skips=False, descriptors=True)
    kinds = {"portable": INTERPRETED_TILES if device.type == "cpu" else WIDE_TILES}
    if device.type != "cpu" and dtype != torch.float32:
        kinds = {"portable": NARROW_TILES} | (TMA_TILES if architecture in TMA_ARCHITECTURES else {})
    others = [ForwardTiles(m, n, min(v, padded(V)), warps, stages, kind)
              for kind, shapes in kinds.items() for m, n, v, warps, stages in shapes]  # fmt: skip
    return list(dict.fromkeys([default, *others]))


def backward_tiles_of(device: torch.device, dtype: torch.dtype, C: int) -> list[Any]:
    """Tiles of the backward worth measuring, the default first."""
    from stm_kernels.gpu.tuning import affinity_tiles

    default = affinity_tiles(_architecture(device), dtype, C)
    kind = "interpreted" if device.type == "cpu" else "wide" if dtype == torch.float32 else "narrow"
    names = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    return list(
        dict.fromkeys([default, *(replace(default, **dict(zip(names, tile))) for tile in BACKWARD_TILES[kind])])
    )


@contextmanager
def chosen(forward: Any = None, backward: Any = None, positions_per_split: int = 0) -> Iterator[None]:
    """Triton reads meanwhile have these tiles, and split their memory so; None and 0 leave it to the defaults."""
    import stm_kernels.gpu.backward as backward_module
    import stm_kernels.gpu.forward as forward_module

    with ExitStack() as stack:

        def patch(module: Any, name: str, function: Callable) -> None:
            stack.enter_context(mock.patch.object(module, name, function))

        if forward is not None:
            patch(forward_module, "forward_tiles", lambda *_, **__: forward)
            patch(forward_module, "staged_is_cheaper", lambda *_: False)
        if backward is not None:
            patch(backward_module, "affinity_tiles", lambda *_, **__: backward)
        if positions_per_split:

            def splits(tiles: Any, B: int, M: int, N: int, *_: int) -> tuple[int, int]:
                size = -(-positions_per_split // tiles.block_n) * tiles.block_n
                return -(-N // size), size

            patch(forward_module, "forward_splits", splits)
        yield


def _with_splits(problem: Problem, splits: int) -> Ratios:
    with chosen(positions_per_split=-(-problem.memory_key.shape[1] // splits)):
        return error_ratios(problem, read_by("triton"), gradients=False)


def _with_tiles(problem: Problem, index: int, way: str) -> Ratios:
    device, dtype, C = problem.query_key.device, problem.query_key.dtype, problem.query_key.shape[2]
    forward = tiles_of(device, dtype, C, problem.memory_value.shape[2])
    choice = (
        {"forward": forward[index]} if way == "forward" else {"backward": backward_tiles_of(device, dtype, C)[index]}
    )
    with chosen(**choice):
        return error_ratios(problem, read_by("triton"), gradients=way == "backward")


def _overlapping(problem: Problem) -> Problem:
    B, N, C = problem.memory_key.shape
    return replace(
        problem,
        query_key=problem.query_key[:1].expand(B, -1, -1),
        memory_key=problem.memory_key.flatten()[: N + C].as_strided((B, N, C), (0, 1, 1)),
        memory_value=problem.memory_value[:1, :, :1].expand(B, -1, problem.memory_value.shape[2]),
    )


def _exactly(same: bool) -> Ratios:
    return {"out": 0.0 if same else float("inf")}


def _one_position(problem: Problem) -> Ratios:
    """The only value, to the last bit."""
    found = results(problem, read_by("triton"), gradients=False)["out"]
    return _exactly(found.equal(problem.memory_value.expand_as(found)))


def _repeated(problem: Problem) -> Ratios:
    first, second = (results(problem, read_by("triton")) for _ in range(2))
    return _exactly(all(first[name].equal(second[name]) for name in first))


def _in_chunks(problem: Problem) -> Ratios:
    import stm_kernels.gpu.backward as backward

    with mock.patch.object(backward, "keys_per_chunk", lambda *_: 64):
        return error_ratios(problem, read_by("triton"))


def skip_ratios(problem: Problem, skip: float) -> Ratios:
    """Against the softmax of what was read; and against all of it, by the error that skipping promises."""
    names = ("query_key", "memory_key", "memory_value")
    inputs = [getattr(problem, name).detach().requires_grad_() for name in names]
    out, lse, skipped, kept = read_operator(*inputs, None, None, problem.scale, 0, skip, "triton")
    grads = torch.autograd.grad([out, lse], inputs, [problem.grad_out, problem.grad_lse.double()])
    found = {"out": out, "lse": lse.float(), "skipped": skipped}
    found |= {f"grad_{name}": grad for name, grad in zip(names, grads)}
    wide, narrow = problem.to(torch.float64), problem.to(problem.query_key.dtype)
    truth, plain = (_skipping_reference(each, kept) for each in (wide, narrow))
    ratios = allowed_error_shares(truth, plain, found)
    whole, whole_plain = (results(each, gradients=False) for each in (wide, narrow))
    promised = 2 * skip * problem.memory_value.abs().max().item()
    ratios["bound"] = allowed_error_shares(whole, whole_plain, {"out": out}, promised)["out"]
    ratios["weight left out"] = truth["skipped"].max().item() / skip
    return ratios


def _skipping_reference(problem: Problem, kept: Tensor) -> dict[str, Tensor]:
    """What a read that skips gives when it reads the blocks `kept`."""
    names = ("query_key", "memory_key", "memory_value")
    query_key, memory_key, memory_value = inputs = [getattr(problem, name).detach().requires_grad_() for name in names]
    logits = reference_logits(query_key, memory_key, problem.scale)
    _, M, N = logits.shape
    mask = kept.repeat_interleave(SKIP_QUERIES, 1).repeat_interleave(SKIP_POSITIONS, 2)[:, :M, :N].bool()
    out = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ memory_value
    wide = logits if logits.dtype == torch.float64 else logits.float()
    # a block that was not read has no gradient
    lse = torch.where(mask, wide, wide.detach()).logsumexp(-1)
    skipped = -torch.expm1(wide.masked_fill(~mask, -torch.inf).logsumexp(-1) - lse)
    grads = torch.autograd.grad([out, lse], inputs, [problem.grad_out, problem.grad_lse])
    found = {"out": out.detach(), "lse": lse.detach(), "skipped": skipped.detach()}
    return found | {f"grad_{name}": grad for name, grad in zip(names, grads)}


def _usage(problem: Problem, top_k: int | None = None) -> Ratios:
    keys, scale = (problem.query_key, problem.memory_key), problem.scale
    wide = problem.to(torch.float64)
    truth = {"usage": reference_usage(wide.query_key, wide.memory_key, scale, top_k=top_k)}
    plain = {"usage": reference_usage(*keys, scale, top_k=top_k)}
    found = [memory_usage(*keys, scale=scale, top_k=top_k, implementation="triton")]
    if top_k is None:
        lse = results(problem, read_by("triton"), gradients=False)["lse"]
        found.append(memory_usage(*keys, scale=scale, lse=lse, implementation="triton"))
    return {"usage": max(allowed_error_shares(truth, plain, {"usage": usage})["usage"] for usage in found)}


def _paged(problem: Problem) -> Ratios:
    (B, N, C), V = problem.memory_key.shape, problem.memory_value.shape[2]
    kind = {"dtype": problem.memory_key.dtype, "device": problem.memory_key.device}
    memory = PagedMemory(B, C, V, page_size=N // 3 + 1, **kind)
    for key, value in zip(problem.memory_key.split(N // 4 + 1, 1), problem.memory_value.split(N // 4 + 1, 1)):
        memory.append(key, value)

    def read(query_key: Tensor, *_: Tensor, scale: float) -> tuple[Tensor, ...]:
        return memory.read(query_key, scale=scale, return_lse=True, implementation="triton")

    return error_ratios(problem, read, gradients=False)


def _merge(problem: Problem) -> Ratios:
    """The kernel that merges against its twin in PyTorch, one part of three empty."""
    from stm_kernels.gpu.merge import triton_merge

    outs = torch.stack([problem.grad_out.float(), problem.grad_out.float().flip(1), problem.grad_out.float()])
    lses = torch.stack([problem.grad_lse, 50 * problem.grad_lse, torch.full_like(problem.grad_lse, -torch.inf)])
    outs, lses = outs.contiguous(), lses.double().contiguous()
    names, dtype = ("out", "lse"), problem.query_key.dtype
    out, lse = merge_reads(outs, lses.float())
    truth, plain = merge_reads(outs.double(), lses), (out.to(dtype), lse)
    return allowed_error_shares(*(dict(zip(names, each)) for each in (truth, plain, triton_merge(outs, lses, dtype))))


def _huge(device: torch.device) -> Ratios:
    problem = draw_problem(1, 300, 2**31 // 512 + 5000, 128, 512, dtype=torch.bfloat16, device=device)
    return sample_of(problem).ratios(results(problem, read_by("triton"), gradients=False))


def _huge_gradients(device: torch.device) -> Ratios:
    """Of a memory hidden but for its ends, the last of which lies beyond 32 bits: a small problem in a large one."""
    problem = draw_problem(1, 64, 2**31 // 512 + 5000, 128, 512, dtype=torch.float16, device=device)
    N = problem.memory_key.shape[1]
    hidden = torch.ones(N, dtype=torch.bool, device=device)
    hidden[:100] = hidden[-4000:] = False
    bias = torch.zeros(1, N, device=device).masked_fill(hidden, -torch.inf)
    seen = {name: getattr(problem, name)[:, ~hidden] for name in ("memory_key", "memory_value")}
    small = replace(problem, **seen, key_bias=bias[:, ~hidden])
    truth, plain = results(small.to(torch.float64)), results(small)
    found = results(replace(problem, key_bias=bias), read_by("triton"))
    leak = any(found[f"grad_{name}"][:, hidden].any().item() for name in seen)
    for name in ("grad_memory_key", "grad_memory_value", "grad_key_bias"):
        found[name] = found[name][:, ~hidden]
    return allowed_error_shares(truth, plain, found) | {"hidden positions": float("inf") if leak else 0.0}


def _random_shapes(device: torch.device, tiny: bool, seed: int, count: int) -> Result:
    """Problems of any shape and form until they are all seen or the time is over."""
    draw, begun = random.Random(seed), time.time()
    for done in range(count):
        if time.time() - begun > RANDOM_SECONDS:
            return {"shapes": done}
        C, V = draw.choice(RANDOM_CHANNELS[:2] if tiny else RANDOM_CHANNELS)
        sizes = draw.randint(1, 3), draw.randint(2, 40 if tiny else 700), draw.randint(20, 80 if tiny else 2000), C, V
        form = {"dtype": draw.choice(dtypes_of(device)), "peak": draw.choice([0.5, 1.0, 5.0])}
        form |= {"seed": draw.randrange(10**6), "channel_major": draw.random() < 0.5}
        form |= dict.fromkeys(("biased", "ragged"), draw.random() < 0.3)
        try:
            assert_bounded(make_problem(*sizes, **form, device=device), read_by("triton"))
        except AssertionError as error:
            return {"failed": f"B, M, N, C, V = {sizes}, {form}: {error}", "shapes": done}
    return {"shapes": count}
