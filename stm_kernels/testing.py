"""Problems to read and the yardstick of their errors, shared by tests/ and bench/.

The truth is float64. The allowed error is twice that of plain PyTorch in the same dtype, plus one rounding of the
largest result.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stm_kernels.read import memory_read

Read = Callable[..., tuple[Tensor, ...]]
"""A read of a problem: `read(query_key, memory_key, memory_value, **problem.options())` gives at least out and lse."""


@dataclass(frozen=True)
class Problem:
    """A read and the gradients that flow back into it."""

    query_key: Tensor
    """`[B, M, C]`"""
    memory_key: Tensor
    """`[B, N, C]`"""
    memory_value: Tensor
    """`[B, N, V]`"""
    scale: float
    """Factor of the dot product."""
    grad_out: Tensor
    """`[B, M, V]`"""
    grad_lse: Tensor
    """`[B, M]`, in float32 or wider"""
    similarity: str = "dot"
    """As in `memory_read`; likewise the rest."""
    key_bias: Tensor | None = None
    """`[B, N]`, in float32 or wider"""
    lengths: Tensor | None = None
    """`[B]`"""
    top_k: int | None = None
    """None is all."""

    def options(self) -> dict[str, Any]:
        """The scale, and all other settings that are not the defaults of `memory_read`, except the bias."""
        options: dict[str, Any] = {"scale": self.scale}
        if self.similarity != "dot":
            options["similarity"] = self.similarity
        for name in ("lengths", "top_k"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        return options

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same problem in another dtype."""
        names = ("query_key", "memory_key", "memory_value", "grad_out")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        converted: dict[str, Any] = {name: getattr(self, name).to(dtype) for name in names}
        if self.key_bias is not None:
            converted["key_bias"] = self.key_bias.to(wide)
        return replace(self, **converted, grad_lse=self.grad_lse.to(wide))

    def on(self, device: torch.device | str) -> "Problem":
        """The same problem on another device."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


def make_problem(
    B: int,
    M: int,
    N: int,
    C: int,
    V: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    peak: float = 1.0,
    channel_major: bool = False,
    similarity: str = "dot",
    biased: bool = False,
    ragged: bool = False,
    seed: int = 0,
) -> Problem:
    """Draw a problem of normally distributed keys and values.

    Args:
        B, M, N, C, V: its sizes.
        dtype: of keys, values and the read.
        device: of all tensors.
        peak: standard deviation of a logit; the larger, the fewer memory positions hold the mass of a query.
        channel_major: keys, values and their gradients are laid out as convolutions leave them, `[B, C, N]` in memory.
        similarity: as in `memory_read`.
        biased: with a normally distributed `key_bias` that hides every third position.
        ragged: with `lengths` from N for the first item of the batch to 0 for the last, and NaN as padding.
        seed: of the draw, the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        tensor = torch.randn(B, rows, columns, generator=generator, dtype=torch.float64)
        tensor = tensor.mT.contiguous().mT if channel_major else tensor
        return tensor.to(device=device)

    problem = Problem(
        draw(M, C) * peak, draw(N, C), draw(N, V), C**-0.5, draw(M, V), draw(M, 1)[..., 0].contiguous(), similarity
    )  # fmt: skip
    if biased:
        key_bias = draw(N, 1)[..., 0].contiguous()
        key_bias[:, ::3] = -torch.inf
        problem = replace(problem, key_bias=key_bias)
    if ragged:
        lengths = [N - b * N // max(B - 1, 1) for b in range(B)]
        for b, length in enumerate(lengths):
            problem.memory_key[b, length:] = problem.memory_value[b, length:] = torch.nan
        problem = replace(problem, lengths=torch.tensor(lengths, device=device))
    return problem.to(dtype)


def make_tie_problem(
    B: int, M: int, N: int, C: int, V: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Problem:
    """Draw a problem of whole-numbered keys in nearly equal pairs, with logits of about ±10⁴ that are exact in float32.

    Args:
        B, M, N, C, V, dtype, device: as in `make_problem`.
    """
    problem = make_problem(B, M, N, C, V, dtype=torch.float64, device=device)
    spread = (1e4 / (3 * C**0.5)) ** 0.5
    memory_key = (problem.memory_key * spread).round()
    # neighbours differ by one in one channel: their logits by an entry of the query, 0 or ±1 there
    pairs = N // 2 * 2
    memory_key[:, 1:pairs:2] = memory_key[:, 0:pairs:2]
    memory_key[:, 1:pairs:2, 0] += 1
    query_key = (problem.query_key * spread).round()
    query_key[:, :, 0].clamp_(-1, 1)
    return replace(problem, query_key=query_key, memory_key=memory_key, scale=1.0).to(dtype)


def read_by(implementation: str, **options: Any) -> Read:
    """The public read by one implementation, as a function of a problem's tensors and options."""

    def read(*inputs: Tensor, **problem: Any) -> tuple[Tensor, ...]:
        query_key, memory_key, memory_value = inputs
        settings = {**problem, **options, "return_lse": True, "implementation": implementation}
        return memory_read(query_key, memory_key, memory_value, **settings)

    return read


def results(problem: Problem, read: Read | None = None, gradients: bool = True) -> dict[str, Tensor]:
    """Run a read, the reference unless told otherwise: `out`, `lse` and, if asked, the gradients by each input:
    `grad_query_key`, `grad_memory_key`, `grad_memory_value` and, where there is one, `grad_key_bias`.
    """
    names = ["query_key", "memory_key", "memory_value"] + ["key_bias"] * (problem.key_bias is not None)
    inputs = {name: getattr(problem, name).detach().requires_grad_(gradients) for name in names}
    bias = {name: inputs[name] for name in names[3:]}
    read = read or read_by("reference")
    out, lse = read(*(inputs[name] for name in names[:3]), **bias, **problem.options())[:2]
    found = {"out": out.detach(), "lse": lse.detach()}
    if gradients:
        grads = torch.autograd.grad([out, lse], list(inputs.values()), [problem.grad_out, problem.grad_lse])
        found |= {f"grad_{name}": grad for name, grad in zip(names, grads)}
    return found


def error_ratios(
    problem: Problem, read: Read, gradients: bool = True, plain_read: Read | None = None
) -> dict[str, float]:
    """Error over allowed error of each result of a read: more than 1 is wrong.

    Args:
        problem: in the dtype to judge; the truth is float64 on the same inputs.
        read: the read to judge.
        gradients: judge the backward pass too.
        plain_read: plain PyTorch's read, in any dtype; None is the reference.

    Returns:
        error ÷ (2 · error of plain PyTorch in the same dtype + one rounding of the largest true result), for each of
        `results`; infinite where the read is not finite.
    """
    truth = results(problem.to(torch.float64), plain_read, gradients)
    plain = results(problem, plain_read, gradients)
    return allowed_error_shares(truth, plain, results(problem, read, gradients))


def allowed_error_shares(
    truth: dict[str, Tensor], plain: dict[str, Tensor], found: dict[str, Tensor], slack: float = 0.0
) -> dict[str, float]:
    """`error_ratios` of given results, for each name in `found`.

    Args:
        truth: `results` in float64.
        plain: `results` of plain PyTorch in the dtype to judge.
        found: what to judge.
        slack: error allowed on top.
    """
    ratios = {}
    for name, result in found.items():
        true, other = truth[name], plain[name]
        # -inf, of a row with no visible key, must be exactly there
        empty = true.isneginf()
        if not result.isneginf().equal(empty):
            ratios[name] = float("inf")
            continue
        true, result, other = (t.masked_fill(empty, 0.0) for t in (true, result, other))
        error, plain_error = ((tensor - true).abs().amax().item() for tensor in (result, other))
        rounding = torch.finfo(result.dtype).eps / 2 * true.abs().amax().item()
        ratio = error / (2 * plain_error + rounding + slack) if error else 0.0
        ratios[name] = ratio if result.isfinite().all() else float("inf")
    return ratios


def assert_exact(problem: Problem, read: Read, gradients: bool = True, plain_read: Read | None = None) -> None:
    """Raise AssertionError where a read errs more than the yardstick allows; arguments as in `error_ratios`."""
    ratios = error_ratios(problem, read, gradients, plain_read)
    wrong = {name: round(ratio, 2) for name, ratio in ratios.items() if not ratio <= 1}
    assert not wrong, f"error over allowed error: {wrong}"


def extra_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes that `function` held at once beyond what was there before, its result included.

    Args:
        function: what to run, once.
        device: whose memory to watch.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    held = most = 0
    for size in allocations(function):
        held += size
        most = max(most, held)
    return most


def allocations(function: Callable[[], object]) -> list[int]:
    """What `function` takes of the CPU's memory on one thread, in bytes and in order; what it gives back is negative.

    Each further thread of a read takes about as much again, but for the results.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = function()
    finally:
        torch.set_num_threads(threads)
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
