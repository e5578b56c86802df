"""Every implementation against float64, by the error of plain PyTorch in the same dtype."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stm_kernels.cpu.chunked as chunked
import stm_kernels.gpu.forward as forward
from stm_kernels import memory_read
from stm_kernels.reference import reference_logits
from stm_kernels.testing import (
    Problem,
    assert_exact,
    error_ratios,
    make_problem,
    make_tie_problem,
    read_by,
    results,
)

CHUNKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton's interpreter multiplies bfloat16 wrongly: there it is tested on a GPU only
TRITON_DTYPES = CHUNKED_DTYPES if torch.cuda.is_available() else (torch.float32, torch.float16)

CASES = [("chunked", dtype) for dtype in CHUNKED_DTYPES] + [("triton", dtype) for dtype in TRITON_DTYPES]
each_case = pytest.mark.parametrize("implementation, dtype", CASES, ids=lambda value: str(value).removeprefix("torch."))


def device_of(implementation: str) -> str:
    return "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"


@each_case
@pytest.mark.parametrize("channel_major", [False, True], ids=["token_major", "channel_major"])
@pytest.mark.parametrize("peak", [1.0, 5.0])
def test_read_and_gradients(implementation, dtype, channel_major, peak):
    sizes = (2, 150, 1500, 64, 96) if implementation == "chunked" else (2, 50, 100, 32, 48)
    problem = make_problem(
        *sizes, dtype=dtype, peak=peak, channel_major=channel_major, device=device_of(implementation)
    )
    assert_exact(problem, read_by(implementation))


@each_case
@pytest.mark.parametrize("C, V", [(16, 16), (20, 33), (100, 70), (200, 17), (256, 300)])
def test_channels_that_are_no_power_of_two(implementation, dtype, C, V):
    problem = make_problem(1, 40, 70, C, V, dtype=dtype, device=device_of(implementation))
    assert_exact(problem, read_by(implementation))


@each_case
def test_logits_of_ten_thousand(implementation, dtype):
    N = 1100 if implementation == "chunked" else 90
    problem = make_tie_problem(1, 40, N, 64, 40, dtype=dtype, device=device_of(implementation))
    assert (problem.query_key.double() @ problem.memory_key.double().mT).abs().max() > 9000
    assert_exact(problem, read_by(implementation))


@each_case
@pytest.mark.parametrize("M, N", [(1, 50), (50, 1), (1, 1)])
def test_one_query_or_one_position(implementation, dtype, M, N):
    problem = make_problem(2, M, N, 32, 24, dtype=dtype, device=device_of(implementation))
    found = results(problem, read_by(implementation))
    truth = results(problem.to(torch.float64))
    if N == 1:
        assert found["out"].equal(problem.memory_value.expand_as(found["out"]))
    # a dot product of C terms and what follows it: each step rounds once
    rounding = torch.finfo(dtype).eps * problem.query_key.shape[2]
    for name, true in truth.items():
        magnitude = max(true.abs().max().item(), problem.memory_value.abs().max().item())
        torch.testing.assert_close(found[name].double(), true, rtol=0, atol=rounding * magnitude)


@each_case
def test_one_position_leaves_the_keys_no_gradient(implementation, dtype):
    problem = make_problem(1, 20, 1, 32, 24, dtype=dtype, device=device_of(implementation))
    problem = replace(problem, grad_lse=torch.zeros_like(problem.grad_lse))
    found = results(problem, read_by(implementation))
    # the difference of two dot products of V terms, which are equal
    bound = problem.grad_out.norm(dim=2).max() * problem.memory_value.norm() * torch.finfo(torch.float32).eps
    for name in ("grad_query_key", "grad_memory_key"):
        assert found[name].abs().max() <= bound * problem.query_key.norm()


@each_case
def test_expanded_and_overlapping_inputs(implementation, dtype):
    problem = make_problem(2, 30, 60, 32, 24, dtype=dtype, device=device_of(implementation))
    line = problem.memory_key.flatten()[: 60 + 32]
    overlapping = replace(
        problem,
        query_key=problem.query_key[:1].expand(2, -1, -1),
        memory_key=line.as_strided((2, 60, 32), (0, 1, 1)),
        memory_value=problem.memory_value[:1, :, :1].expand(2, -1, 24),
        grad_out=problem.grad_out[:, :, :1].expand(-1, -1, 24),
    )
    spaced = replace(
        problem,
        memory_key=problem.memory_key.repeat_interleave(3, dim=2)[:, :, ::3],
        memory_value=problem.memory_value.repeat_interleave(2, dim=1)[:, ::2].flip(1),
    )
    for strided in (overlapping, spaced):
        assert_exact(strided, read_by(implementation))


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_order_of_the_memory_does_not_matter(implementation):
    dtype = torch.float64 if implementation == "chunked" else torch.float16
    problem = make_problem(1, 30, 200, 32, 24, dtype=dtype, peak=3.0, device=device_of(implementation))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).to(problem.memory_key.device)
    shuffled = replace(problem, memory_key=problem.memory_key[:, order], memory_value=problem.memory_value[:, order])
    for name, found in results(shuffled, read_by(implementation)).items():
        expected = results(problem, read_by(implementation))[name]
        expected = expected[:, order] if name.startswith("grad_memory") else expected
        torch.testing.assert_close(found, expected, rtol=0, atol=200 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("implementation", ["chunked", "triton", "reference"])
@pytest.mark.parametrize("B, M, N", [(2, 3, 0), (2, 0, 5), (0, 3, 5)])
def test_nothing_to_read(implementation, B, M, N):
    problem = make_problem(B, M, N, 16, 24, device=device_of(implementation))
    found = results(problem, read_by(implementation))
    assert found["out"].equal(torch.zeros_like(problem.grad_out))
    assert found["lse"].equal(torch.full_like(problem.grad_lse, -torch.inf))
    if implementation != "reference":
        assert all(not tensor.any() for name, tensor in found.items() if name.startswith("grad"))


@st.composite
def random_problems(draw, most: tuple[int, ...]) -> Problem:
    """Problems of any form: sizes up to `most` (B, M, N, C, V), layout, similarity, bias, lengths, hidden positions."""
    B, M, N, C, V = (draw(st.integers(1, size)) for size in most)
    problem = make_problem(
        *(B, M, N, C, V),
        dtype=draw(st.sampled_from([torch.float16, torch.float32])),
        channel_major=draw(st.booleans()),
        peak=draw(st.sampled_from([0.1, 1.0, 10.0])),
        seed=draw(st.integers(0, 1000)),
    )
    # of logits as far apart as those of the dot product, float16's own squares would be all error
    similarity = "l2" if problem.query_key.dtype == torch.float32 and draw(st.booleans()) else "dot"
    lengths = torch.tensor([draw(st.integers(0, N)) for _ in range(B)]) if draw(st.booleans()) else None
    key_bias = None
    if draw(st.booleans()):
        key_bias = torch.randn(B, N, generator=torch.Generator().manual_seed(draw(st.integers(0, 1000))))
        key_bias[:, :: draw(st.integers(1, 4))] = -torch.inf
    return replace(problem, similarity=similarity, lengths=lengths, key_bias=key_bias)


def assert_bounded(problem, read):
    """Fail where a read or a gradient errs more than rounding explains, of problems so small that the error of plain
    PyTorch is a matter of luck: every weight errs relatively by the rounding of its logit, every sum by one rounding
    per term, taken of the sum of the terms' magnitudes.
    """
    truth, found = results(problem.to(torch.float64)), results(problem, read)
    (_, M, C), (_, N, V) = problem.query_key.shape, problem.memory_value.shape
    largest, terms = magnitudes(problem.to(torch.float64))
    wide = torch.finfo(torch.float64 if problem.query_key.dtype == torch.float64 else torch.float32)
    narrow = torch.finfo(problem.query_key.dtype)
    relative = wide.eps * ((C + 8) * largest + C + V + N + M) + 4 * narrow.eps
    # weights and their gradients too small for the dtype of the inputs
    lost = narrow.tiny * narrow.eps * (N + M)
    wrong = {}
    for name, true in truth.items():
        empty = true.isneginf()
        assert found[name].isneginf().equal(empty), (
            f"{name}: -inf where a query sees a position, or not where it sees none"
        )
        error = (found[name].masked_fill(empty, 0.0) - true.masked_fill(empty, 0.0)).abs().amax().item()
        bound = relative * (terms[name] + true.masked_fill(empty, 0.0).abs().amax().item()) + lost * terms["any"]
        if not error <= bound:
            wrong[name] = error / bound
    assert not wrong, f"error over what rounding explains: {wrong}"


def magnitudes(problem):
    """The largest magnitude of a logit's terms, and of each result the largest sum of its terms' magnitudes."""
    options = problem.options()
    scale = options.pop("scale")
    bias = problem.key_bias
    logits = reference_logits(problem.query_key, problem.memory_key, scale, key_bias=bias, **options)
    weights = logits.masked_fill(logits.isneginf().all(-1, keepdim=True), 0.0).softmax(-1)
    weights = weights.masked_fill(logits.isneginf(), 0.0)
    query, key, value, grad_out = (
        tensor.nan_to_num(0.0).abs()
        for tensor in (problem.query_key, problem.memory_key, problem.memory_value, problem.grad_out)
    )
    # a squared distance is made of three products, and differentiates by both its ends
    distance = problem.similarity == "l2"
    pairs = scale * (query @ key.mT)
    if distance:
        pairs = 2 * pairs + scale * (query.square().sum(2)[:, :, None] + key.square().sum(2)[:, None])
    largest = pairs.amax().item() + (0.0 if bias is None else bias.nan_to_num(neginf=0.0).abs().amax().item())
    grads = weights * (grad_out @ value.mT + (grad_out * (weights @ value)).sum(2, keepdim=True) + 1)
    grads = grads * problem.grad_lse.abs().clamp(min=1).amax()
    factor = 2 * scale if distance else scale
    ends = (query.amax(), key.amax()) if distance else (0.0, 0.0)
    terms = {
        "out": weights @ value,
        "lse": pairs + 1,
        "grad_query_key": factor * (grads @ key + grads.sum(2, keepdim=True) * ends[0]),
        "grad_memory_key": factor * (grads.mT @ query + grads.sum(1)[:, :, None] * ends[1]),
        "grad_memory_value": weights.mT @ grad_out,
        "grad_key_bias": grads.sum(1),
        "any": torch.stack([query.amax(), key.amax(), value.amax(), grad_out.amax()]) * max(1.0, factor),
    }
    return largest, {name: term.amax().item() for name, term in terms.items()}


@given(problem=random_problems((3, 40, 80, 40, 40)))
def test_random_problems_chunked(problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "QUERIES_PER_BLOCK", 16)
        patch.setattr(chunked, "KEYS_PER_CHUNK", 32)
        patch.setattr(chunked, "BACKWARD_KEYS_PER_CHUNK", (8, 24))
        assert_bounded(problem, read_by("chunked"))


@given(problem=random_problems((2, 40, 70, 40, 70)), parts=st.integers(1, 3))
def test_random_problems_triton(problem, parts):
    def splits(tiles, B, M, N, V, multiprocessors):
        positions = max(1, N // parts) // tiles.block_n * tiles.block_n + tiles.block_n
        return -(-N // positions), positions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "forward_splits", splits)
        assert_bounded(problem.on(device_of("triton")), read_by("triton"))


def test_the_yardstick_sees_a_read_that_rounds_its_logits():
    problem = make_problem(1, 60, 100, 32, 24, peak=3.0)

    def careless(query_key, memory_key, memory_value, scale):
        logits = (query_key @ memory_key.mT * scale).bfloat16().float()
        return logits.softmax(-1) @ memory_value, logits.logsumexp(-1)

    ratios = error_ratios(problem, careless)
    assert min(ratios.values()) > 100


def test_the_yardstick_sees_a_result_that_is_not_finite():
    problem = make_problem(1, 6, 10, 8, 4)

    def broken(query_key, memory_key, memory_value, scale):
        out, lse = memory_read(query_key, memory_key, memory_value, scale=scale, return_lse=True)
        return out * torch.nan, lse

    with pytest.raises(AssertionError, match="'out': inf"):
        assert_exact(problem, broken, gradients=False)
