"""The read of the k best positions: its choice, its weights, its gradients, whatever selects."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from top_k_cases import device_of, each_case, each_implementation, small_chunks, whole_numbered  # noqa: F401

import stm_kernels.cpu.select as cpu_select
import stm_kernels.cpu.top_k as cpu_top_k
from stm_kernels import memory_read, memory_usage
from stm_kernels.affinity import Affinity
from stm_kernels.operator import backward_operator, read_operator
from stm_kernels.testing import assert_exact, extra_memory, make_problem, make_tie_problem, read_by, results

quick = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25
)


def separated(problem, top_k, least=1e-2):
    """The problem, whose choice is certain in half precision too: the k-th and the next logit differ."""
    problem = replace(problem, top_k=top_k)
    logits = problem.query_key.double() @ problem.memory_key.double().mT * problem.scale
    if top_k < logits.shape[2]:
        best = logits.topk(top_k + 1).values
        clear = best[..., top_k - 1] - best[..., top_k] > least
        # a query for which it is not certain asks like the first one for which it is
        for item in range(len(clear)):
            certain = clear[item].nonzero()[0]
            problem.query_key[item, ~clear[item]] = problem.query_key[item, certain]
    return problem


@each_case
@pytest.mark.parametrize("channel_major", [False, True], ids=["token_major", "channel_major"])
@pytest.mark.parametrize("k", [1, 30])
def test_read_and_gradients(implementation, dtype, channel_major, k):
    sizes = (2, 40, 150, 32, 48) if implementation == "chunked" else (2, 9, 90, 32, 48)
    problem = make_problem(*sizes, dtype=dtype, peak=2.0, channel_major=channel_major, device=device_of(implementation))
    assert_exact(separated(problem, k, 0.03), read_by(implementation))


@each_case
@pytest.mark.parametrize("k", [1, 5, 40, 100])
def test_of_equal_logits_the_lower_index_wins(implementation, dtype, k):
    problem = whole_numbered(make_problem(2, 10, 60, 16, 8, dtype=dtype, device=device_of(implementation)), k)
    assert_chosen(problem, implementation)


@each_case
def test_all_equal(implementation, dtype):
    problem = whole_numbered(make_problem(1, 5, 70, 16, 8, dtype=dtype, device=device_of(implementation)), 20)
    problem.memory_key[:] = problem.memory_key[:, :1]
    indices, _ = select_by(problem, implementation)
    assert indices.equal(torch.arange(20, dtype=torch.int32, device=indices.device).expand(1, 5, 20))


@each_implementation
@pytest.mark.parametrize("k", [3, 40])
def test_lengths_and_bias(implementation, k):
    problem = hidden(whole_numbered(make_problem(4, 6, 60, 16, 8, device=device_of(implementation)), k))
    assert_chosen(problem, implementation)
    # what lies behind a memory's end is as if it were not there
    for item, length in enumerate(problem.lengths.tolist()):
        problem.memory_key[item, length:] = torch.nan
        problem.memory_value[item, length:] = torch.nan
    assert_exact(problem, read_by(implementation))


def select_by(problem, implementation):
    """Positions and logits `[B, M, k]`, sorted by position."""
    if implementation == "triton":
        select = pytest.importorskip("stm_kernels.gpu.top_k").triton_select
    else:
        select = cpu_select.chunked_select
    affinity = Affinity(
        problem.query_key, problem.memory_key, problem.scale, problem.key_bias,
        None if problem.lengths is None else problem.lengths.int(),
    )  # fmt: skip
    indices, logits = select(affinity, problem.top_k)
    order = indices.sort(dim=2, stable=True)
    return order.values, logits.gather(2, order.indices)


def assert_chosen(problem, implementation):
    """The choice is that of a stable sort in float64; the logits of the problem must be exact."""
    logits = problem.query_key.double() @ problem.memory_key.double().mT * problem.scale
    if problem.key_bias is not None:
        logits += problem.key_bias[:, None]
    behind = torch.zeros_like(logits, dtype=torch.bool)
    if problem.lengths is not None:
        behind = torch.arange(logits.shape[2], device=logits.device) >= problem.lengths[:, None, None]
    best = logits.masked_fill(behind, -torch.inf).sort(dim=2, descending=True, stable=True)
    expected = best.indices[..., : problem.top_k]
    expected = expected.masked_fill(behind.expand_as(logits).gather(2, expected), 0).sort(dim=2).values
    indices, found = select_by(problem, implementation)
    assert indices.dtype == torch.int32 and indices.long().equal(expected)
    assert found.double().sort(dim=2).values.equal(best.values[..., : problem.top_k].sort(dim=2).values)


def hidden(problem):
    """The problem with some positions hidden by a bias, in one memory all of them, and memories of many lengths."""
    key_bias = torch.zeros_like(problem.memory_key[:, :, 0], dtype=torch.float32)
    key_bias[:, 1::3] = -torch.inf
    key_bias[:, 2::3] = 1.5
    key_bias[3] = -torch.inf
    lengths = torch.tensor([60, 7, 0, 60], device=key_bias.device)
    return replace(problem, key_bias=key_bias, lengths=lengths)


@each_implementation
def test_a_query_that_sees_nothing_reads_nothing(implementation):
    problem = hidden(make_problem(4, 6, 60, 16, 8, device=device_of(implementation)))
    found = results(replace(problem, top_k=5), read_by(implementation))
    for item in (2, 3):
        assert not found["out"][item].any() and found["lse"][item].isneginf().all()
        assert not any(found[f"grad_{name}"][item].any() for name in ("query_key", "memory_key", "memory_value"))


@pytest.mark.parametrize("width", [4, 40], ids=["a whole tile", "several tiles"])
@pytest.mark.parametrize("first, second", [(-0.0, 0.0), (0.0, -0.0)])
def test_the_kernel_holds_minus_zero_equal_to_zero(monkeypatch, width, first, second):
    kernels, tuning = pytest.importorskip("stm_kernels.gpu.top_k"), pytest.importorskip("stm_kernels.gpu.tuning")
    monkeypatch.setattr(tuning, "MAX_GROUPS", 16)
    device = device_of("triton")
    values = torch.full((3, width), -1.0, device=device)
    values[:, 1], values[:, -1] = first, second
    best, chosen = torch.empty(3, 1, device=device), torch.empty(3, 1, dtype=torch.int32, device=device)
    architecture = pytest.importorskip("stm_kernels.gpu.launch").architecture_of(values.device)
    kernels.select_launch(values, None, best, chosen, architecture).run(values.device)
    assert (chosen == 1).all() and not best.any()


@each_implementation
def test_key_that_is_no_number_shows(implementation):
    problem = replace(make_problem(1, 4, 130, 16, 8, device=device_of(implementation)), top_k=3)
    problem.memory_key[:, 100] = torch.nan
    out = memory_read(
        problem.query_key, problem.memory_key, problem.memory_value, top_k=3, implementation=implementation
    )
    assert out.isnan().all()


@each_case
def test_logits_of_ten_thousand(implementation, dtype):
    problem = make_tie_problem(1, 20, 90, 64, 40, dtype=dtype, device=device_of(implementation))
    assert_exact(separated(problem, 8, 0.5), read_by(implementation))


@each_implementation
@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_similarity(implementation, similarity):
    problem = make_problem(2, 9, 50, 16, 8, device=device_of(implementation))
    assert_exact(replace(problem, similarity=similarity, top_k=6), read_by(implementation))


@each_implementation
@pytest.mark.parametrize("k", [50, 1000])
def test_of_no_more_positions_all_are_read(implementation, k):
    problem = make_problem(2, 9, 50, 16, 8, device=device_of(implementation))
    found = results(replace(problem, top_k=k), read_by(implementation))
    for name, expected in results(problem, read_by("reference")).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)


@each_implementation
def test_chunks_and_long_rows(monkeypatch, implementation):
    if implementation == "triton":
        kernels, tuning = pytest.importorskip("stm_kernels.gpu.top_k"), pytest.importorskip("stm_kernels.gpu.tuning")
        monkeypatch.setattr(kernels, "groups_per_chunk", lambda queries: 3)
        monkeypatch.setattr(tuning, "MAX_GROUPS", 16)
    problem = make_problem(2, 4, 110, 16, 8, device=device_of(implementation))
    for k in (4, 60):
        assert_chosen(whole_numbered(problem, k), implementation)


@pytest.mark.parametrize("N", [1500, 1513], ids=["whole groups", "a part of a group"])
def test_a_long_chunk_is_bounded_by_its_groups(monkeypatch, N):
    monkeypatch.setattr(cpu_select, "KEYS_PER_CHUNK", 1024)
    monkeypatch.setattr(cpu_select, "GROUP", 8)
    for k in (1, 5, 40):
        # no group divides the first chunk of 43 queries
        for M in (30, 43):
            assert_chosen(whole_numbered(make_problem(1, M, N, 16, 8), k), "chunked")


@each_implementation
@pytest.mark.parametrize("channel_major", [False, True], ids=["token_major", "channel_major"])
def test_gradients_lie_in_memory_as_their_inputs_do(implementation, channel_major):
    problem = make_problem(2, 5, 40, 16, 20, channel_major=channel_major, device=device_of(implementation))
    found = results(replace(problem, top_k=4), read_by(implementation))
    for name in ("query_key", "memory_key", "memory_value"):
        assert found[f"grad_{name}"].stride() == getattr(problem, name).stride()


@each_implementation
def test_expanded_and_spaced_inputs(implementation):
    problem = replace(make_problem(2, 6, 40, 16, 20, device=device_of(implementation)), top_k=5)
    strided = replace(
        problem,
        query_key=problem.query_key[:1].expand(2, -1, -1),
        memory_key=problem.memory_key.repeat_interleave(3, dim=2)[:, :, ::3],
        memory_value=problem.memory_value.repeat_interleave(2, dim=1)[:, ::2],
        grad_out=problem.grad_out[:, :, :1].expand(-1, -1, 20),
    )
    assert_exact(strided, read_by(implementation))


@each_implementation
def test_order_of_the_memory_does_not_matter(implementation):
    dtype = torch.float64 if implementation == "chunked" else torch.float32
    problem = replace(make_problem(1, 8, 100, 16, 8, dtype=dtype, device=device_of(implementation)), top_k=9)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).to(problem.memory_key.device)
    shuffled = replace(problem, memory_key=problem.memory_key[:, order], memory_value=problem.memory_value[:, order])
    for name, found in results(shuffled, read_by(implementation)).items():
        expected = results(problem, read_by(implementation))[name]
        expected = expected[:, order] if name.startswith("grad_memory") else expected
        torch.testing.assert_close(found, expected, rtol=0, atol=100 * torch.finfo(dtype).eps)


@each_implementation
def test_equal_bits_from_run_to_run(implementation):
    problem = make_problem(2, 8, 60, 16, 20, dtype=torch.float16, device=device_of(implementation))
    problem = whole_numbered(problem, 11)
    first, second = (results(problem, read_by(implementation)) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_gradcheck(k):
    problem = make_problem(3, 2, 12, 4, 3, dtype=torch.float64)
    inputs = [problem.query_key, problem.memory_key, problem.memory_value, problem.memory_key[..., 0].clone()]
    lengths = torch.tensor([12, 2, 7])

    def read(query_key, memory_key, memory_value, key_bias):
        return memory_read(
            query_key, memory_key, memory_value, key_bias=key_bias, lengths=lengths, top_k=k, return_lse=True
        )

    torch.autograd.gradcheck(read, [tensor.requires_grad_() for tensor in inputs])


@each_implementation
def test_opcheck(implementation):
    problem = make_problem(2, 4, 20, 16, 8, device=device_of(implementation))
    tensors = [t.requires_grad_() for t in (problem.query_key, problem.memory_key, problem.memory_value)]
    key_bias = torch.randn(2, 20, device=problem.query_key.device).requires_grad_()
    lengths = torch.tensor([20, 9], dtype=torch.int32, device=problem.query_key.device)
    settings = (0.3, 4, 0.0, implementation)
    torch.library.opcheck(read_operator, (*tensors, key_bias, lengths, *settings))
    inputs = [t.detach() for t in (*tensors, key_bias)]
    out, lse, skipped, choice = read_operator(*inputs, lengths, *settings)
    grads = (torch.randn_like(out), torch.randn_like(lse))
    torch.library.opcheck(backward_operator, (*grads, *inputs, lengths, out, lse, skipped, choice, *settings))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic):
    torch.compiler.reset()

    def read(query_key, memory_key, memory_value):
        return memory_read(query_key, memory_key, memory_value, top_k=4, return_lse=True)

    compiled = torch.compile(read, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for sizes in ((2, 5, 7, 6, 3), (3, 9, 8, 10, 4)):
        problem = make_problem(*sizes)
        expected, found = (results(problem, lambda *inputs, scale, f=f: f(*inputs)) for f in (read, compiled))
        assert all(found[name].equal(expected[name]) for name in expected)


def test_scratch_does_not_grow_with_the_memory(monkeypatch):
    monkeypatch.setattr(cpu_top_k, "COPIED", 2**14)

    def extra(N, channel_major):
        problem = replace(make_problem(1, 64, N, 16, 64, channel_major=channel_major), top_k=8)
        return extra_memory(lambda: results(problem, read_by("chunked"), gradients=False))

    assert extra(8000, False) < 1.05 * extra(1000, False)
    # of values whose rows are not contiguous a slice of 16 channels is copied while the last one is still held
    assert extra(8000, True) < 1.05 * extra(8000, False) + 2 * 4 * 16 * 8000


@each_implementation
@pytest.mark.parametrize("k", [1, 6, 40])
def test_usage(implementation, k):
    problem = replace(make_problem(2, 9, 40, 16, 8, device=device_of(implementation)), top_k=k)
    lengths = torch.tensor([40, 13], device=problem.query_key.device)
    tensors = (problem.query_key, problem.memory_key)
    found = memory_usage(*tensors, top_k=k, lengths=lengths, implementation=implementation)
    doubles = (tensor.double() for tensor in tensors)
    expected = memory_usage(*doubles, top_k=k, lengths=lengths, implementation="reference")
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.sum(1), torch.full_like(found[:, 0], 9.0))
    assert found.equal(memory_usage(*tensors, top_k=k, lengths=lengths, implementation=implementation))


def test_usage_of_the_best_takes_no_log_sum_exp():
    problem = make_problem(1, 3, 5, 4, 4)
    with pytest.raises(ValueError, match="lse: expected None beside top_k, .* got a tensor"):
        memory_usage(problem.query_key, problem.memory_key, top_k=2, lse=torch.zeros(1, 3))


@quick
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 30, 120, 20, 20))),
    k=st.integers(1, 60),
    channel_major=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_shapes_chunked(sizes, k, channel_major, seed):
    problem = make_problem(*sizes, channel_major=channel_major, seed=seed)
    assert_chosen(whole_numbered(problem, k), "chunked")
    problem = replace(problem.to(torch.float64), top_k=k)
    found = results(problem, read_by("chunked"))
    for name, expected in results(problem).items():
        torch.testing.assert_close(found[name], expected)


@settings(quick, max_examples=8)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (2, 6, 120, 20, 20))),
    k=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_random_shapes_triton(sizes, k, seed):
    problem = make_problem(*sizes, dtype=torch.float16, seed=seed, device=device_of("triton"))
    assert_chosen(whole_numbered(problem, k), "triton")
