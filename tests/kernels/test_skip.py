"""Reads that leave values out: how far off they may be, and that all they return follows from what they left out."""

from dataclasses import replace

import pytest
import torch

import stm_kernels.cpu.skip as cpu_skip
import stm_kernels.gpu.forward as forward
from stm_kernels import memory_read
from stm_kernels.affinity import SKIP_POSITIONS, SKIP_QUERIES
from stm_kernels.cpu import flash
from stm_kernels.operator import backward_operator, read_operator
from stm_kernels.reference import reference_logits
from stm_kernels.testing import Problem, Read, assert_exact, make_problem, make_tie_problem, read_by, results

ON_GPU = torch.cuda.is_available()
CHUNKED = [("chunked", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
# Triton's interpreter multiplies bfloat16 wrongly: there it is tested on a GPU only
TRITON = [("triton", dtype) for dtype in (torch.float32, torch.float16, *[torch.bfloat16] * ON_GPU)]
each_case = pytest.mark.parametrize(
    "implementation, dtype", CHUNKED + TRITON, ids=lambda value: str(value).removeprefix("torch.")
)
each_implementation = pytest.mark.parametrize("implementation", ["chunked", "triton"])

B, M, N, C, V = 2, 40, 150, 32, 24


@pytest.fixture(autouse=True)
def several_blocks_and_chunks(monkeypatch):
    monkeypatch.setattr(cpu_skip, "QUERIES_PER_BLOCK", 16)
    monkeypatch.setattr(cpu_skip, "PRODUCTS", 16 * 48)
    monkeypatch.setattr(flash, "has_tiles", lambda: False)
    # of any memory values are gathered, in one with no peak too
    monkeypatch.setattr(cpu_skip, "MIN_MULTIPLICATIONS", 0)
    monkeypatch.setattr(cpu_skip, "GATHERED_CHANNELS", 1)
    monkeypatch.setattr(cpu_skip, "MAX_GATHERED", 2.0)


def even() -> Problem:
    """Every position weighs the same."""
    problem = make_problem(B, M, N, C, V, dtype=torch.float64)
    return replace(problem, query_key=torch.zeros_like(problem.query_key))


def late() -> Problem:
    """Nearly all weight lies in one block of positions, which a walk from the newest on sees last."""
    problem = make_problem(B, M, N, C, V, dtype=torch.float64)
    problem.query_key[:, :, 0] = C**0.5
    problem.memory_key[:, :27, 0] += 12
    return problem


def recent() -> Problem:
    """Nearly all weight lies in the newest positions."""
    problem = late()
    return replace(problem, memory_key=problem.memory_key.flip(1))


def sharp() -> Problem:
    """All weight that a sum in float32 shows lies in the newest positions."""
    problem = recent()
    problem.memory_key[:, -27:, 0] += 18
    return problem


def local() -> Problem:
    """Neighbouring queries weigh the same few blocks of positions."""
    problem = make_problem(B, M, N, C, V, dtype=torch.float64)
    places = make_problem(B, 3, 3, C, V, dtype=torch.float64, seed=1).query_key * 2
    query_key = places[:, torch.arange(M) // SKIP_QUERIES] + problem.query_key * 0.3
    memory_key = places[:, torch.arange(N) // SKIP_POSITIONS % 3] + problem.memory_key * 0.3
    return replace(problem, query_key=query_key, memory_key=memory_key)


def huge() -> Problem:
    """What weighs little has values of a thousand."""
    problem = local()
    weights = (problem.query_key @ problem.memory_key.mT * problem.scale).softmax(-1)
    problem.memory_value[weights.amax(1) < 1e-3] *= 1000
    return problem


def peaked() -> Problem:
    return make_problem(B, M, N, C, V, dtype=torch.float64, peak=10.0)


def ties() -> Problem:
    """Logits of ±10⁴ in nearly equal pairs."""
    return make_tie_problem(B, M, N, C, V, dtype=torch.float64)


def ragged() -> Problem:
    """Of three memories one is whole, one ends within a block, one is empty; every third position is hidden."""
    return make_problem(3, M, N, C, V, dtype=torch.float64, peak=10.0, biased=True, ragged=True)


def blind() -> Problem:
    """One batch item has hidden all its positions."""
    problem = make_problem(B, M, N, C, V, dtype=torch.float64, peak=10.0, biased=True)
    problem.key_bias[1] = -torch.inf
    return problem


PROBLEMS = (even, late, recent, sharp, local, huge, peaked, ties, ragged, blind)
each_problem = pytest.mark.parametrize("make", PROBLEMS, ids=lambda make: make.__name__)


def on_device(problem: Problem, implementation: str, dtype: torch.dtype) -> Problem:
    device = "cuda" if implementation == "triton" and ON_GPU else "cpu"
    return problem.on(device).to(dtype)


def operator_arguments(problem: Problem, skip: float, implementation: str) -> tuple:
    lengths = None if problem.lengths is None else problem.lengths.int()
    inputs = (problem.query_key, problem.memory_key, problem.memory_value, problem.key_bias, lengths)
    return *inputs, problem.scale, 0, skip, implementation


def weights_of(problem: Problem) -> torch.Tensor:
    """The affinity `[B, M, N]` in float64, with zeros in rows that see nothing."""
    exact = problem.to(torch.float64)
    options = {"key_bias": exact.key_bias, "lengths": exact.lengths}
    return reference_logits(exact.query_key, exact.memory_key, exact.scale, **options).softmax(-1).nan_to_num()


def was_read(problem: Problem, skip: float, skipped: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """`[B, M, N]`, true where the map says so; on a CPU there is none, as the weights say it."""
    M, N = problem.query_key.shape[1], problem.memory_key.shape[1]
    if kept.ndim == 3:
        return kept.bool().repeat_interleave(SKIP_QUERIES, 1).repeat_interleave(SKIP_POSITIONS, 2)[:, :M, :N]
    counts = torch.full((len(kept),), N) if problem.lengths is None else problem.lengths.clamp(min=1)
    return (weights_of(problem) >= skip / counts[:, None, None]) | (skipped == 0)[:, :, None]


def read_of(was_read: torch.Tensor) -> Read:
    """Plain PyTorch's softmax over the positions that were read, beside the log-sum-exp of all."""

    def read(query_key, memory_key, memory_value, scale, key_bias=None, lengths=None):
        logits = reference_logits(query_key, memory_key, scale, key_bias=key_bias, lengths=lengths)
        blind = logits.isneginf().all(-1, keepdim=True)
        logits = logits.masked_fill(blind, 0.0)
        weights = logits.masked_fill(~was_read & ~blind, -torch.inf).softmax(-1).masked_fill(blind, 0.0)
        wide = logits if logits.itemsize == 8 else logits.float()
        # what was not read has no gradient
        lse = torch.where(was_read, wide, wide.detach()).logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)
        return weights @ memory_value.nan_to_num(), lse

    return read


@each_case
@each_problem
def test_all_follows_from_what_was_left_out(implementation, dtype, make):
    skip = 0.05
    problem = on_device(make(), implementation, dtype)
    *_, skipped, kept = read_operator(*operator_arguments(problem, skip, implementation))
    mask = was_read(problem, skip, skipped, kept)
    assert_exact(problem, read_by(implementation, skip=skip), plain_read=read_of(mask))
    exact = problem.to(torch.float64)
    logits = reference_logits(
        exact.query_key, exact.memory_key, exact.scale, key_bias=exact.key_bias, lengths=exact.lengths
    )
    left_out = weights_of(problem).masked_fill(mask, 0.0).sum(-1)
    # a logit is rounded to 16 bits in bfloat16 and to 24 else, a log-sum-exp to 53; sums are of at most N terms, and
    # what weighs less than their rounding in all is not looked at on a CPU
    largest = logits.masked_fill(logits.isneginf(), 0.0).abs().amax().item()
    rounding = (2**-16 if dtype == torch.bfloat16 else 2**-23) * (largest + N)
    unseen = 2**-23 if implementation == "chunked" else 0.0
    torch.testing.assert_close(skipped.double(), left_out, rtol=rounding, atol=2**-50 * largest + unseen)
    assert skipped.max() <= skip * (1 + N * torch.finfo(torch.float32).eps)


@each_case
@each_problem
@pytest.mark.parametrize("skip", [1e-3, 0.5])
def test_how_far_off_a_read_may_be(implementation, dtype, make, skip):
    problem = on_device(make(), implementation, dtype)
    inputs = (problem.query_key, problem.memory_key, problem.memory_value)
    options = {"key_bias": problem.key_bias, **problem.options(), "implementation": implementation}
    out, lse, skipped = memory_read(*inputs, **options, skip=skip, return_lse=True, return_skipped=True)
    truth = results(problem.to(torch.float64), gradients=False)
    most = problem.memory_value.nan_to_num().abs().amax().item()
    plain = (results(problem, gradients=False)["out"] - truth["out"]).abs().amax()
    # beside what was left out no more than the yardstick's
    allowed = 2 * skipped * most + 2 * plain + torch.finfo(dtype).eps / 2 * most
    assert ((out - truth["out"]).abs().amax(2) <= allowed).all()
    assert skipped.max() <= skip * (1 + N * torch.finfo(torch.float32).eps)
    # the log-sum-exp is that of all positions
    assert_exact(problem, lambda *inputs, **options: (truth["out"].to(dtype), lse), gradients=False)


def test_half_of_an_even_mass_is_two_blocks_of_five():
    # the blocks have 32, 32, 32, 32 and 22 of 150 positions: half are 75, two blocks fit, a third does not
    problem = on_device(even(), "triton", torch.float32)
    *_, kept = read_operator(*operator_arguments(problem, 0.5, "triton"))
    assert kept.shape[2] == 5 and (kept.sum(2) == 3).all()
    # a thousandth is not one block
    *_, kept = read_operator(*operator_arguments(problem, 1e-3, "triton"))
    assert kept.all()


@pytest.mark.parametrize("make", [local, recent])
def test_blocks_of_little_mass_are_dropped(make):
    problem, skip = make(), 1e-3
    weights = (problem.query_key @ problem.memory_key.mT * problem.scale).softmax(-1)
    # of each query, by block of positions; and of each block of queries the most that one of them has there
    mass = torch.stack([part.sum(2) for part in weights.split(SKIP_POSITIONS, 2)], 2)
    mass = torch.stack([part.amax(1) for part in mass.split(SKIP_QUERIES, 1)], 1)
    heavy = mass > skip
    # the others can be dropped together, whatever their order, with a margin for roundings
    assert mass.masked_fill(heavy, 0.0).sum(2).max() < skip / 2 and (~heavy).any(2).all()
    # the newest block is read first, when there is nothing to compare it with
    may_be_read = heavy.clone()
    may_be_read[:, :, -1] = True
    arguments = operator_arguments(on_device(problem, "triton", torch.float32), skip, "triton")
    *_, kept = read_operator(*arguments)
    kept = kept.cpu().bool()
    assert kept[heavy].all() and not kept[~may_be_read].any()


@each_implementation
def test_a_weight_of_nearly_all(implementation):
    problem = on_device(even(), implementation, torch.float32)
    out, lse, skipped = read_by(implementation, skip=1 - 1e-12, return_skipped=True)(
        problem.query_key, problem.memory_key, problem.memory_value, scale=problem.scale
    )
    assert out.isfinite().all() and lse.isfinite().all() and skipped.max() < 1


@each_implementation
def test_what_is_left_out_is_not_read(implementation):
    problem = on_device(local(), implementation, torch.float32)
    arguments = operator_arguments(problem, 1e-3, implementation)
    out, _, skipped, kept = read_operator(*arguments)
    # what is too little for a sum is not even noted as dropped
    read = was_read(problem, 1e-3, torch.ones_like(skipped), kept)[:, :SKIP_QUERIES].any(1)
    assert not read.all(1).any()
    found, *_ = read_operator(
        *arguments[:2], problem.memory_value.masked_fill(~read[..., None], torch.nan), *arguments[3:]
    )
    assert found[:, :SKIP_QUERIES].equal(out[:, :SKIP_QUERIES])


def test_parts_of_a_memory_leave_out_their_own(monkeypatch):
    monkeypatch.setattr(forward, "multiprocessors", lambda device: 64)
    problem = on_device(make_problem(2, 40, 700, C, V, dtype=torch.float64, peak=15.0), "triton", torch.float32)
    *_, skipped, kept = read_operator(*operator_arguments(problem, 0.1, "triton"))
    assert 0 < kept.float().mean() < 1
    mask = was_read(problem, 0.1, skipped, kept)
    assert_exact(problem, read_by("triton", skip=0.1), plain_read=read_of(mask))


def test_a_memory_without_a_peak_is_read_whole(monkeypatch):
    monkeypatch.setattr(cpu_skip, "MAX_GATHERED", 0.4)
    problem = make_problem(B, M, N, C, V)
    *found, skipped, _ = read_operator(*operator_arguments(problem, 0.5, "chunked"))
    assert not skipped.any()
    for one, other in zip(found, read_operator(*operator_arguments(problem, 0.0, "chunked"))):
        assert one.equal(other)


def test_where_flash_attention_reads_nothing_is_dropped(monkeypatch):
    problem = on_device(recent(), "chunked", torch.bfloat16)
    arguments = operator_arguments(problem, 0.05, "chunked")
    assert (read_operator(*arguments)[2] > 0).any()
    monkeypatch.setattr(flash, "has_tiles", lambda: True)
    assert not read_operator(*arguments)[2].any()


def test_a_small_memory_is_read_whole(monkeypatch):
    problem = on_device(recent(), "chunked", torch.float32)
    arguments = operator_arguments(problem, 0.05, "chunked")
    assert (read_operator(*arguments)[2] > 0).all()
    monkeypatch.setattr(cpu_skip, "MIN_MULTIPLICATIONS", M * N * V + 1)
    assert not read_operator(*arguments)[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_from_the_first_block_on_that_has_no_peak_all_is_read(monkeypatch, dtype):
    monkeypatch.setattr(cpu_skip, "MAX_GATHERED", 0.4)
    # the first and the 21st query are asked whether it pays
    monkeypatch.setattr(cpu_skip, "PROBED", 2)
    skip, problem = 0.05, sharp()
    # of one item no query has a peak, of the other those in the last of three blocks; yet some weights are small
    problem.query_key[0] *= 0.25
    problem.query_key[1, 30:] *= 0.25
    problem = problem.to(dtype)
    gathers = []
    heaviest = cpu_skip._heaviest
    monkeypatch.setattr(cpu_skip, "_heaviest", lambda *inputs: gathers.append(heaviest(*inputs)) or gathers[-1])
    *_, skipped, kept = read_operator(*operator_arguments(problem, skip, "chunked"))
    assert [bag is not None for bag in gathers] == [False, True, True, True, False]
    assert_exact(problem, read_by("chunked", skip=skip), plain_read=read_of(was_read(problem, skip, skipped, kept)))


def test_key_that_is_no_number_shows():
    problem = on_device(recent(), "chunked", torch.float32)
    problem.memory_key[:, 100] = torch.nan
    assert read_operator(*operator_arguments(problem, 0.05, "chunked"))[0].isnan().all()


@each_implementation
def test_the_gradients_of_a_block_that_was_not_read_are_zero(implementation):
    problem = on_device(sharp(), implementation, torch.float32)
    found = results(problem, read_by(implementation, skip=1e-3))
    start = (N - 27) // SKIP_POSITIONS * SKIP_POSITIONS
    for name in ("grad_memory_key", "grad_memory_value"):
        assert found[name][:, start:].any() and not found[name][:, :start].any()


@each_implementation
def test_opcheck(implementation):
    problem = on_device(ragged(), implementation, torch.float32)
    arguments = operator_arguments(problem, 0.2, implementation)
    torch.library.opcheck(read_operator, arguments)
    outputs = read_operator(*arguments)
    grads = [torch.randn_like(output) for output in outputs[:2]]
    torch.library.opcheck(backward_operator, (*grads, *arguments[:5], *outputs, *arguments[5:]))


def test_nothing_to_leave_out():
    for sizes in ((2, 3, 0), (2, 0, 5), (0, 3, 5), (2, 3, 1)):
        problem = make_problem(*sizes, 16, 24)
        inputs = (problem.query_key, problem.memory_key, problem.memory_value)
        out, skipped = memory_read(*inputs, skip=0.5, return_skipped=True)
        assert out.equal(memory_read(*inputs)) and not skipped.any()
