"""Whether every variant is right on this device: against float64, by the yardstick of `stm_kernels.testing`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.tiles import affinity_candidates, forward_candidates, read_with, wrong
from bench.workers import Result, Task
from stm_kernels import PagedMemory, memory_usage, merge_reads
from stm_kernels.affinity import SKIP_POSITIONS, SKIP_QUERIES
from stm_kernels.operator import read_operator
from stm_kernels.reference import reference_logits, reference_usage
from stm_kernels.testing import (
    Problem,
    allowed_error_shares,
    assert_bounded,
    draw_problem,
    error_ratios,
    make_problem,
    make_tie_problem,
    read_by,
    results,
    sample_of,
)

Ratios = dict[str, float]

RANDOM_SHAPES = 1000
RANDOM_TASKS = 8
RANDOM_SECONDS = 60.0
# every pair of channel counts is a compilation: few pairs, of all kinds
RANDOM_CHANNELS = ((16, 16), (20, 33), (64, 96), (128, 512), (100, 70))


def check_tasks(device: torch.device, tiny: bool, seed: int) -> dict[str, Task]:
    """Every check by name, those of the dtype that matters most first; `tiny` where a kernel is interpreted."""
    dtypes = [torch.float16, torch.float32] if device.type == "cpu" else [torch.bfloat16, torch.float16, torch.float32]
    checks: dict[str, Callable[[], Ratios]] = {}
    for dtype in dtypes:
        for name, check in _checks(device, dtype, tiny).items():
            checks[f"{str(dtype).removeprefix('torch.')}: {name}"] = check
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


def _judge(check: Callable[[], Ratios]) -> Result:
    ratios = check()
    reason = wrong(ratios)
    return {"failed": reason} if reason else {"error_over_allowed": max(ratios.values())}


def _checks(device: torch.device, dtype: torch.dtype, tiny: bool) -> dict[str, Callable[[], Ratios]]:
    read = read_by("triton")
    sizes = (2, 40, 90, 16, 48) if tiny else (2, 1620, 3300, 128, 512)
    odd = (1, 33, 70, 20, 33) if tiny else (3, 131, 517, 100, 300)

    def make(shape: tuple[int, ...] = sizes, **options: Any) -> Problem:
        return make_problem(*shape, dtype=dtype, device=device, **options)

    def exact(problem: Callable[[], Problem], reader: Callable = read, gradients: bool = True) -> Callable[[], Ratios]:
        return lambda: error_ratios(problem(), reader, gradients)

    checks = {
        "read and backward": exact(make),
        "peaked": exact(partial(make, peak=5.0)),
        "channel-major": exact(partial(make, channel_major=True)),
        "odd sizes": exact(partial(make, odd)),
        "logits of 10^4": exact(
            lambda: make_tie_problem(1, *((40, 90) if tiny else (300, 900)), 64, 40, dtype=dtype, device=device)
        ),
        "bias, lengths, hidden positions": exact(lambda: _masked(make(odd))),
        "squared distance": exact(lambda: replace(make(odd), similarity="l2")),
        "values of many objects": exact(
            lambda: make((1, 33, 70, 16, 6 * 64) if tiny else (1, 700, 2100, 128, 3 * 512)), gradients=False
        ),
        "one position": lambda: _one_position(make((2, 40, 1, 16, 24))),
        "overlapping strides": exact(lambda: _overlapping(make(odd))),
        "backward in chunks": lambda: _chunked_backward(make(odd)),
        "skip": lambda: skip_ratios(draw_problem(*sizes, dtype=dtype, device=device, tracked=True), 1e-3),
        "skip much": lambda: skip_ratios(make(odd, peak=4.0), 0.2),
        "top-k": exact(lambda: replace(make(odd), top_k=7)),
        "top-k of more than there are": exact(lambda: replace(make((1, 40, 20, 16, 24)), top_k=30)),
        "top-k among equals": exact(
            lambda: replace(make_tie_problem(1, 40, 90, 64, 40, dtype=dtype, device=device), top_k=7)
        ),
        "usage": lambda: _usage(make()),
        "usage of the best": lambda: _usage(make(odd), 7),
        "paged": lambda: _paged(make(odd)),
        "merge": lambda: _merge(make(odd)),
        "equal bits from run to run": lambda: _repeated(make()),
    }
    for splits in (2, 3, 64):
        checks[f"{splits} splits"] = lambda splits=splits: _with_tiles(make(odd), splits=splits)
    for index in range(1, len(_forward_tiles(device, dtype, sizes))):
        checks[f"tile {index}"] = lambda index=index: _with_tiles(make(odd), index)
    for index in range(1, len(affinity_candidates(_architecture(device), dtype, sizes[3]))):
        checks[f"backward tile {index}"] = lambda index=index: _with_backward_tiles(make(odd), index)
    return checks


def _architecture(device: torch.device) -> str:
    from stm_kernels.gpu.launch import architecture_of

    return architecture_of(device)


def _forward_tiles(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> list[Any]:
    return forward_candidates(_architecture(device), dtype, sizes[3], sizes[4], False, True)


def _with_tiles(problem: Problem, index: int = 0, splits: int = 0) -> Ratios:
    # channels of whole 16 bytes: tiles that need descriptors get them
    C, V = problem.query_key.shape[2] // 8 * 8, problem.memory_value.shape[2] // 8 * 8
    problem = replace(
        problem,
        query_key=problem.query_key[:, :, :C].contiguous(),
        memory_key=problem.memory_key[:, :, :C].contiguous(),
        memory_value=problem.memory_value[:, :, :V].contiguous(),
        grad_out=problem.grad_out[:, :, :V],
    )
    import stm_kernels.gpu.forward as forward

    tiles = _forward_tiles(problem.query_key.device, problem.query_key.dtype, (0, 0, 0, C, V))[index]
    chosen = forward.forward_splits
    if splits:
        size = -(-problem.memory_key.shape[1] // splits // tiles.block_n) * tiles.block_n
        forward.forward_splits = lambda *_: (-(-problem.memory_key.shape[1] // size), size)
    try:
        return error_ratios(problem, read_with(tiles), gradients=False)
    finally:
        forward.forward_splits = chosen


def _with_backward_tiles(problem: Problem, index: int) -> Ratios:
    dtype, C = problem.query_key.dtype, problem.query_key.shape[2]
    tiles = affinity_candidates(_architecture(problem.query_key.device), dtype, C)[index]
    return error_ratios(problem, read_with(backward=tiles))


def _masked(problem: Problem) -> Problem:
    """Biased, some positions hidden, one memory short and NaN behind its end, another empty."""
    B, N, _ = problem.memory_key.shape
    bias = make_problem(B, 1, N, 1, 1, seed=1, device=problem.query_key.device).memory_key[..., 0].contiguous()
    bias[:, ::5] = -torch.inf
    lengths = torch.tensor([max(0, N - item * (N // 2 + 3)) for item in range(B)], device=bias.device)
    behind = torch.arange(N, device=bias.device) >= lengths[:, None]
    value = problem.memory_value.masked_fill(behind[:, :, None], torch.nan)
    return replace(problem, memory_value=value, key_bias=bias, lengths=lengths)


def _overlapping(problem: Problem) -> Problem:
    B, N, C = problem.memory_key.shape
    line = problem.memory_key.flatten()[: N + C]
    return replace(
        problem,
        query_key=problem.query_key[:1].expand(B, -1, -1),
        memory_key=line.as_strided((B, N, C), (0, 1, 1)),
        memory_value=problem.memory_value[:1, :, :1].expand(B, -1, problem.memory_value.shape[2]),
    )


def _one_position(problem: Problem) -> Ratios:
    """The only value, to the last bit."""
    found = results(problem, read_by("triton"), gradients=False)
    same = found["out"].equal(problem.memory_value.expand_as(found["out"]))
    return {"out": 0.0 if same else float("inf")}


def _chunked_backward(problem: Problem) -> Ratios:
    import stm_kernels.gpu.backward as backward

    whole, backward.keys_per_chunk = backward.keys_per_chunk, lambda *_: 64
    try:
        return error_ratios(problem, read_by("triton"))
    finally:
        backward.keys_per_chunk = whole


def skip_ratios(problem: Problem, skip: float) -> Ratios:
    """Against the softmax of what was read; and against all of it, by the error that skipping promises."""
    names = ("query_key", "memory_key", "memory_value")
    inputs = [getattr(problem, name).detach().requires_grad_() for name in names]
    out, lse, skipped, kept = read_operator(*inputs, None, None, problem.scale, 0, skip, "triton")
    grads = torch.autograd.grad([out, lse], inputs, [problem.grad_out, problem.grad_lse.double()])
    found = {"out": out, "lse": lse.float(), "skipped": skipped}
    found |= {f"grad_{name}": grad for name, grad in zip(names, grads)}
    truth, plain = (_skipping_reference(problem.to(to), kept) for to in (torch.float64, problem.query_key.dtype))
    ratios = allowed_error_shares(truth, plain, found)
    whole, whole_plain = (
        results(problem.to(to), gradients=False) for to in (torch.float64, problem.query_key.dtype)
    )  # fmt: skip
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
    read = logits.masked_fill(~mask, -torch.inf)
    out = read.softmax(-1) @ memory_value
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
    errors = [allowed_error_shares(truth, plain, {"usage": usage})["usage"] for usage in found]
    return {"usage": max(errors)}


def _paged(problem: Problem) -> Ratios:
    B, N, C = problem.memory_key.shape
    key, value = problem.memory_key, problem.memory_value
    memory = PagedMemory(
        B, C, value.shape[2], page_size=N // 3 + 1, dtype=key.dtype, device=key.device
    )  # fmt: skip
    for start in range(0, N, N // 4 + 1):
        memory.append(key[:, start : start + N // 4 + 1], value[:, start : start + N // 4 + 1])

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
    truth = dict(zip(names, merge_reads(outs.double(), lses)))
    plain = dict(zip(names, (merge_reads(outs, lses.float())[0].to(dtype), merge_reads(outs, lses.float())[1])))
    return allowed_error_shares(truth, plain, dict(zip(names, triton_merge(outs, lses, dtype))))


def _repeated(problem: Problem) -> Ratios:
    first, second = (results(problem, read_by("triton")) for _ in range(2))
    return {name: 0.0 if first[name].equal(second[name]) else float("inf") for name in first}


def _huge(device: torch.device) -> Ratios:
    problem = draw_problem(1, 300, 2**31 // 512 + 5000, 128, 512, dtype=torch.bfloat16, device=device)
    return sample_of(problem).ratios(results(problem, read_by("triton"), gradients=False))


def _huge_gradients(device: torch.device) -> Ratios:
    """Of a memory hidden but for its ends, the last of which lies beyond 32 bits: a small problem in a large one."""
    problem = draw_problem(1, 64, 2**31 // 512 + 5000, 128, 512, dtype=torch.float16, device=device)
    N = problem.memory_key.shape[1]
    seen = torch.cat([torch.arange(100), torch.arange(N - 4000, N)]).to(device)
    bias = torch.full((1, N), -torch.inf, device=device)
    bias[:, seen] = 0.0
    small = replace(
        problem,
        memory_key=problem.memory_key[:, seen],
        memory_value=problem.memory_value[:, seen],
        key_bias=bias[:, seen],
    )
    truth, plain = results(small.to(torch.float64)), results(small)
    found = results(replace(problem, key_bias=bias), read_by("triton"))
    hidden = torch.ones(N, dtype=torch.bool, device=device)
    hidden[seen] = False
    leak = any(found[f"grad_{name}"][:, hidden].any().item() for name in ("memory_key", "memory_value"))
    for name in ("grad_memory_key", "grad_memory_value", "grad_key_bias"):
        found[name] = found[name][:, seen]
    return allowed_error_shares(truth, plain, found) | {"hidden positions": float("inf") if leak else 0.0}


def _random_shapes(device: torch.device, tiny: bool, seed: int, count: int) -> Result:
    """Problems of any shape and form until they are all seen or the time is over."""
    draw, begun = random.Random(seed), time.time()
    dtypes = [torch.float16, torch.float32] if device.type == "cpu" else [torch.bfloat16, torch.float16, torch.float32]
    for done in range(count):
        if time.time() - begun > RANDOM_SECONDS:
            return {"shapes": done}
        C, V = draw.choice(RANDOM_CHANNELS[:2] if tiny else RANDOM_CHANNELS)
        M, N = draw.randint(2, 40 if tiny else 700), draw.randint(20, 80 if tiny else 2000)
        form = {"dtype": draw.choice(dtypes), "peak": draw.choice([0.5, 1.0, 5.0]), "seed": draw.randrange(10**6)}
        problem = make_problem(draw.randint(1, 3), M, N, C, V, **form, device=device, channel_major=draw.random() < 0.5)
        masked = draw.random() < 0.3
        try:
            assert_bounded(_masked(problem) if masked else problem, read_by("triton"))
        except AssertionError as error:
            shape = {"B": len(problem.query_key), "M": M, "N": N, "C": C, "V": V, "masked": masked} | form
            return {"failed": f"{shape}: {error}", "shapes": done}
    return {"shapes": count}
