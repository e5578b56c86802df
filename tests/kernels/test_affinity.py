"""What weighs a position, in every implementation: similarity, bias, lengths, rows that see nothing; and usage."""

from dataclasses import replace

import pytest
import torch

import stm_kernels.cpu.chunked as chunked
from stm_kernels import memory_read, memory_usage, space_time_memory_read
from stm_kernels.operator import backward_operator, read_operator, usage_operator
from stm_kernels.testing import Problem, assert_exact, make_problem, make_tie_problem, read_by, results

ON_GPU = torch.cuda.is_available()
CHUNKED = [("chunked", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
# Triton's interpreter multiplies bfloat16 wrongly: there it is tested on a GPU only
TRITON = [("triton", dtype) for dtype in (torch.float32, torch.float16, *[torch.bfloat16] * ON_GPU)]
each_case = pytest.mark.parametrize(
    "implementation, dtype", CHUNKED + TRITON, ids=lambda value: str(value).removeprefix("torch.")
)
each_implementation = pytest.mark.parametrize("implementation", ["chunked", "triton"])

VARIANTS = {
    "l2": {"similarity": "l2"},
    "biased": {"biased": True},
    "ragged": {"ragged": True},
    "all": {"similarity": "l2", "biased": True, "ragged": True, "channel_major": True},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(autouse=True)
def several_blocks_and_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "QUERIES_PER_BLOCK", 32)
    monkeypatch.setattr(chunked, "KEYS_PER_CHUNK", 48)
    monkeypatch.setattr(chunked, "BACKWARD_KEYS_PER_CHUNK", (16, 40))


def device_of(implementation: str) -> str:
    return "cuda" if implementation == "triton" and ON_GPU else "cpu"


def inputs_of(problem: Problem) -> tuple[torch.Tensor, ...]:
    return problem.query_key, problem.memory_key, problem.memory_value


@each_case
@each_variant
def test_read_and_gradients(implementation, dtype, variant):
    problem = make_problem(3, 45, 90, 20, 24, dtype=dtype, peak=2.0, device=device_of(implementation), **variant)
    assert_exact(problem, read_by(implementation))


# of rows beyond the last query, which nobody stores
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning:triton")
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning:triton")
@each_case
def test_logits_of_ten_thousand_beside_a_bias_of_ten_thousand(implementation, dtype):
    problem = make_tie_problem(1, 40, 90, 64, 40, dtype=dtype, device=device_of(implementation))
    key_bias = torch.linspace(-1e4, 1e4, 90, device=problem.query_key.device).round()[None].contiguous()
    key_bias[:, 1::2] = key_bias[:, 0::2]
    assert_exact(replace(problem, key_bias=key_bias), read_by(implementation))


@pytest.mark.parametrize("variant", [VARIANTS["l2"], VARIANTS["all"]], ids=["l2", "all"])
@pytest.mark.parametrize("outputs", [(0, 1), (0,), (1,)], ids=["out_and_lse", "out", "lse"])
def test_gradcheck(variant, outputs):
    problem = make_problem(2, 4, 9, 3, 2, dtype=torch.float64, **variant)
    if problem.lengths is not None:
        # a row that sees nothing has a log-sum-exp of -inf, which a difference quotient cannot take
        problem = replace(problem, lengths=torch.tensor([9, 4]))
        finite = {name: getattr(problem, name).nan_to_num() for name in ("memory_key", "memory_value")}
        problem = replace(problem, **finite)
    options = problem.options()
    inputs = [*inputs_of(problem)] + [problem.key_bias] * (problem.key_bias is not None)

    def read(query_key, memory_key, memory_value, key_bias=None):
        results = memory_read(query_key, memory_key, memory_value, key_bias=key_bias, **options, return_lse=True)
        return [results[i] for i in outputs]

    torch.autograd.gradcheck(read, [tensor.detach().requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("implementation", ["chunked", "triton", "reference"])
@pytest.mark.parametrize("hidden_by", ["bias", "lengths"])
@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_an_item_that_sees_nothing(implementation, hidden_by, similarity):
    problem = make_problem(2, 5, 40, 16, 24, similarity=similarity, biased=True, device=device_of(implementation))
    if hidden_by == "bias":
        problem.key_bias[1] = -torch.inf
    else:
        problem = replace(problem, lengths=torch.tensor([40, 0], device=problem.query_key.device))
        problem.memory_key[1] = problem.memory_value[1] = torch.nan
    found = results(problem, read_by(implementation))
    assert found["out"][0].all() and found["lse"][0].isfinite().all()
    assert not found["out"][1].any() and found["lse"][1].isneginf().all()
    for name, gradient in found.items():
        assert name in ("out", "lse") or not gradient[1].any(), name


@each_implementation
@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_what_lies_behind_the_end_is_as_if_it_were_not_there(implementation, similarity):
    problem = make_problem(1, 20, 70, 16, 24, similarity=similarity, biased=True, device=device_of(implementation))
    length = 50
    cut = replace(
        problem,
        memory_key=problem.memory_key[:, :length],
        memory_value=problem.memory_value[:, :length],
        key_bias=problem.key_bias[:, :length].contiguous(),
    )
    expected = results(cut, read_by(implementation))
    for garbage in (torch.nan, torch.inf, 1e30):
        ragged = replace(problem, lengths=torch.tensor([length], device=problem.query_key.device))
        for tensor in (ragged.memory_key, ragged.memory_value, ragged.key_bias):
            tensor[:, length:] = garbage
        found = results(ragged, read_by(implementation))
        for name, true in expected.items():
            if name.startswith(("grad_memory", "grad_key")):
                assert not found[name][:, length:].any(), name
                found[name] = found[name][:, :length]
            # where chunks are cut follows from N: the sums are the same in another order
            rounding = 70 * torch.finfo(true.dtype).eps * true.abs().max().item()
            torch.testing.assert_close(found[name], true, rtol=0, atol=rounding)


@each_implementation
def test_a_hidden_position_is_as_if_it_were_not_there(implementation):
    problem = make_problem(1, 20, 70, 16, 24, biased=True, peak=3.0, device=device_of(implementation))
    seen = problem.key_bias[0].isfinite()
    parts = {name: getattr(problem, name)[:, seen] for name in ("memory_key", "memory_value", "key_bias")}
    expected = results(replace(problem, **parts), read_by(implementation))
    for name, found in results(problem, read_by(implementation)).items():
        if name.startswith(("grad_memory", "grad_key")):
            assert not found[:, ~seen].any(), name
            found = found[:, seen]
        torch.testing.assert_close(found, expected[name])


READS = [("reference", {}), *[(name, {}) for name in ("chunked", "triton")]]
READS += [(name, {"skip": 1e-3}) for name in ("chunked", "triton")]
READS += [(name, {"top_k": k}) for name in ("reference", "chunked", "triton") for k in (5, 60)]


@pytest.mark.parametrize("implementation, options", READS, ids=str)
@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_what_a_hidden_position_holds_is_not_read(implementation, options, similarity):
    # more than 60 positions are hidden: the 60 best are fewer
    problem = make_problem(2, 20, 90, 16, 24, similarity=similarity, biased=True, device=device_of(implementation))
    problem.key_bias[:, 1::3] = -torch.inf
    hidden = problem.key_bias.isneginf()
    read = read_by(implementation, **options)
    usage = {name: value for name, value in options.items() if name == "top_k"} | problem.options()

    def found():
        used = memory_usage(
            problem.query_key, problem.memory_key, key_bias=problem.key_bias, implementation=implementation, **usage
        )
        return results(problem, read) | {"usage": used}

    problem.memory_key[hidden] = problem.memory_value[hidden] = 0.0
    expected = found()
    for garbage in (torch.nan, torch.inf):
        problem.memory_key[hidden] = problem.memory_value[hidden] = garbage
        for name, tensor in found().items():
            assert tensor.equal(expected[name]), name


@each_implementation
def test_a_bias_of_all_positions_shifts_the_log_sum_exp_alone(implementation):
    problem = make_problem(2, 20, 70, 16, 24, device=device_of(implementation))
    shift = torch.full((2, 70), 3.0, device=problem.query_key.device)
    expected, found = (results(p, read_by(implementation)) for p in (problem, replace(problem, key_bias=shift)))
    torch.testing.assert_close(found["lse"], expected["lse"] + 3)
    for name in ("out", "grad_query_key", "grad_memory_key", "grad_memory_value"):
        torch.testing.assert_close(found[name], expected[name])
    torch.testing.assert_close(found["grad_key_bias"].sum(1), problem.grad_lse.sum(1))


@each_implementation
def test_l2_is_the_distance(implementation):
    problem = make_problem(2, 20, 70, 16, 24, device=device_of(implementation))
    logits = -torch.cdist(problem.query_key.double(), problem.memory_key.double()).square() * 0.3
    out, lse = memory_read(
        *inputs_of(problem), scale=0.3, similarity="l2", return_lse=True, implementation=implementation
    )
    torch.testing.assert_close(out, (logits.softmax(-1) @ problem.memory_value.double()).float())
    torch.testing.assert_close(lse, logits.logsumexp(-1).float())


@each_implementation
def test_any_dtype_and_stride_of_bias_and_lengths(implementation):
    problem = make_problem(2, 20, 70, 16, 24, biased=True, device=device_of(implementation))
    expected = read_by(implementation)(*inputs_of(problem), key_bias=problem.key_bias.half(), scale=1.0)
    strided = problem.key_bias.half().repeat_interleave(2, 1)[:, ::2]
    for dtype in (torch.int64, torch.int32, torch.uint8):
        lengths = torch.full((4,), 70, dtype=dtype, device=strided.device)[::2]
        found = read_by(implementation)(*inputs_of(problem), key_bias=strided, lengths=lengths, scale=1.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["chunked", "triton", "reference"])
def test_frames_with_a_bias_and_lengths(implementation):
    device = device_of(implementation)
    B, C, V, T, H, W = 2, 8, 12, 3, 4, 5
    query_key, memory_key = torch.randn(B, C, H, W, device=device), torch.randn(B, C, T, H, W, device=device)
    memory_value, key_bias = torch.randn(B, V, T, H, W, device=device), torch.randn(B, T, H, W, device=device)
    lengths = torch.tensor([3, 1], device=device)
    options = {"return_lse": True, "return_skipped": True, "implementation": implementation}
    out, lse, skipped = space_time_memory_read(
        query_key, memory_key, memory_value, key_bias=key_bias, lengths=lengths, **options
    )
    for b, frames in enumerate(lengths.tolist()):
        part = slice(b, b + 1), slice(None), slice(frames)
        expected = space_time_memory_read(
            query_key[b : b + 1], memory_key[part], memory_value[part], key_bias=key_bias[b : b + 1, :frames], **options
        )
        torch.testing.assert_close((out[b : b + 1], lse[b : b + 1], skipped[b : b + 1]), expected)
    assert skipped.shape == lse.shape and not skipped.any()


def usage_of(problem: Problem, implementation: str, **options) -> torch.Tensor:
    options = {"key_bias": problem.key_bias, **problem.options(), **options}
    return memory_usage(problem.query_key, problem.memory_key, **options, implementation=implementation)


@each_case
@pytest.mark.parametrize("variant", [{}, *VARIANTS.values()], ids=["plain", *VARIANTS])
def test_usage_is_the_column_sums(implementation, dtype, variant):
    problem = make_problem(3, 45, 90, 20, 24, dtype=dtype, peak=2.0, device=device_of(implementation), **variant)
    truth = usage_of(problem.to(torch.float64), "reference")
    found, plain = usage_of(problem, implementation), usage_of(problem, "reference")
    assert found.dtype == torch.float32
    error, plain_error = ((usage - truth).abs().max() for usage in (found, plain))
    assert error <= 2 * plain_error + torch.finfo(torch.float32).eps / 2 * truth.max()
    # the weights of a query sum to 1 up to one rounding a position
    queries = torch.full_like(problem.grad_lse[:, 0], 45)
    if problem.lengths is not None:
        queries[-1] = 0
    torch.testing.assert_close(found.sum(1), queries.float(), rtol=90 * torch.finfo(torch.float32).eps, atol=0)
    assert found.equal(usage_of(problem, implementation))


@pytest.mark.parametrize("implementation", ["chunked", "triton", "reference"])
@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_usage_with_a_given_log_sum_exp(implementation, similarity):
    problem = make_problem(2, 45, 90, 20, 24, similarity=similarity, biased=True, device=device_of(implementation))
    expected = usage_of(problem.to(torch.float64), "reference")
    lse = results(problem.to(torch.float64), gradients=False)["lse"]
    # a float32 log-sum-exp tilts a row by its rounding
    tolerance = {"rtol": 2**-18, "atol": 0}
    torch.testing.assert_close(usage_of(problem, implementation, lse=lse), expected.float(), **tolerance)
    part = replace(problem, memory_key=problem.memory_key[:, 30:70], key_bias=problem.key_bias[:, 30:70])
    found = usage_of(part, implementation, lse=lse.float())
    torch.testing.assert_close(found, expected[:, 30:70].float(), **tolerance)


def test_usage_of_nothing():
    for sizes in ((2, 3, 0), (2, 0, 5), (0, 3, 5)):
        problem = make_problem(*sizes, 16, 24)
        found = usage_of(problem, "chunked")
        assert found.shape == (sizes[0], sizes[2]) and not found.any()


def test_usage_has_no_gradient_and_keeps_float64():
    problem = make_problem(1, 3, 5, 4, 2, dtype=torch.float64)
    usage = memory_usage(problem.query_key.requires_grad_(), problem.memory_key)
    assert not usage.requires_grad and usage.dtype == torch.float64


@each_implementation
def test_opcheck(implementation):
    problem = make_problem(3, 5, 17, 6, 3, biased=True, ragged=True, device=device_of(implementation))
    inputs = [*inputs_of(problem), problem.key_bias]
    lengths = problem.lengths.int()
    settings = (0.3, 0, 0.0, implementation)
    torch.library.opcheck(read_operator, (*(t.detach().requires_grad_() for t in inputs), lengths, *settings))
    outputs = read_operator(*inputs, lengths, *settings)
    grads = [torch.randn_like(output) for output in outputs[:2]]
    torch.library.opcheck(backward_operator, (*grads, *inputs, lengths, *outputs, *settings))
    for lse in (None, outputs[1]):
        torch.library.opcheck(usage_operator, (*inputs[:2], inputs[3], lengths, lse, 0.3, 0, implementation))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic):
    def read(query_key, memory_key, memory_value, key_bias, lengths):
        options = {"key_bias": key_bias, "lengths": lengths, "similarity": "l2"}
        out, lse = memory_read(query_key, memory_key, memory_value, **options, return_lse=True)
        return out, lse, memory_usage(query_key, memory_key, lse=lse, **options)

    torch.compiler.reset()
    compiled = torch.compile(read, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for sizes in ((2, 5, 7, 6, 3), (3, 9, 8, 10, 4)):
        problem = make_problem(*sizes, biased=True, ragged=True)
        inputs = [t.detach().requires_grad_() for t in (*inputs_of(problem), problem.key_bias)]
        found, expected = (function(*inputs, problem.lengths) for function in (compiled, read))
        grads = [torch.autograd.grad(outputs[:1], inputs, problem.grad_out) for outputs in (found, expected)]
        torch.testing.assert_close((*found, *grads[0]), (*expected, *grads[1]), rtol=0, atol=0, equal_nan=False)


def test_autocast():
    problem = make_problem(3, 5, 17, 6, 3, biased=True, ragged=True)
    options = {"key_bias": problem.key_bias, "lengths": problem.lengths, "similarity": "l2", "return_lse": True}
    with torch.autocast("cpu", torch.bfloat16):
        found = memory_read(*inputs_of(problem), **options)
        usage = memory_usage(*inputs_of(problem)[:2], lengths=problem.lengths)
    narrow = [tensor.bfloat16() for tensor in inputs_of(problem)]
    expected = memory_read(*narrow, **options)
    assert found[0].dtype == torch.bfloat16
    assert all(a.equal(b) for a, b in zip(found, expected))
    assert usage.equal(memory_usage(*narrow[:2], lengths=problem.lengths))


def test_vmap():
    problem = make_problem(2, 5, 17, 6, 3, biased=True)
    biases = torch.stack([problem.key_bias, problem.key_bias * 2, -problem.key_bias.nan_to_num(neginf=0.0)], dim=1)
    lengths = torch.tensor([[3, 17], [0, 1], [5, 5]])

    def read(key_bias, lengths):
        out, lse = memory_read(*inputs_of(problem), key_bias=key_bias, lengths=lengths, return_lse=True)
        return out, lse, memory_usage(*inputs_of(problem)[:2], key_bias=key_bias, lengths=lengths)

    found = torch.vmap(read, in_dims=(1, 0))(biases, lengths)
    for index in range(3):
        expected = read(biases[:, index], lengths[index])
        torch.testing.assert_close(tuple(output[index] for output in found), expected)


def ones(*shape, **options):
    return torch.ones(shape, **options)


GOOD = {"query_key": ones(2, 3, 4), "memory_key": ones(2, 5, 4), "memory_value": ones(2, 5, 6)}
BAD = [
    ({"similarity": "cosine"}, ValueError, "similarity: expected one of dot, l2, got 'cosine'"),
    ({"key_bias": [0.0]}, TypeError, "key_bias: expected a floating-point tensor, got list"),
    ({"key_bias": ones(2, 5).bool()}, TypeError, "key_bias: expected a floating-point tensor, got torch.bool"),
    ({"key_bias": ones(2, 5).cfloat()}, TypeError, "key_bias: expected a floating-point tensor, got torch.complex64"),
    ({"key_bias": ones(5)}, ValueError, "key_bias: expected [B, N] = [2, 5], got [5]"),
    ({"key_bias": ones(2, 3, 5)}, ValueError, "key_bias: expected [B, N] = [2, 5], got [2, 3, 5]"),
    (
        {"key_bias": ones(2, 5, device="meta")},
        ValueError,
        "key_bias: expected device cpu as in query_key, got meta",
    ),
    ({"lengths": [5, 5]}, TypeError, "lengths: expected a tensor of integers, got list"),
    ({"lengths": ones(2)}, TypeError, "lengths: expected a tensor of integers, got torch.float32"),
    ({"lengths": ones(2).bool()}, TypeError, "lengths: expected a tensor of integers, got torch.bool"),
    ({"lengths": ones(3).int()}, ValueError, "lengths: expected [B] = [2], got [3]"),
    ({"lengths": ones(2, device="meta").int()}, ValueError, "lengths: expected device cpu as in query_key, got meta"),
    ({"lengths": torch.tensor([5, 6])}, ValueError, "lengths: expected 0 to N = 5 positions, got 6"),
    ({"lengths": torch.tensor([-1, 5])}, ValueError, "lengths: expected 0 to N = 5 positions, got -1"),
]
BAD_CHOICE = [
    ({"skip": -0.1}, ValueError, "skip: expected a share of the softmax mass in [0, 1), got -0.1"),
    ({"skip": 1}, ValueError, "skip: expected a share of the softmax mass in [0, 1), got 1"),
    ({"skip": float("nan")}, ValueError, "skip: expected a share of the softmax mass in [0, 1), got nan"),
    ({"skip": "0.1"}, TypeError, "skip: expected a number, got str"),
    ({"skip": True}, TypeError, "skip: expected a number, got bool"),
    (
        {"skip": 0.1, "top_k": 3},
        ValueError,
        "skip: expected 0 beside top_k, which drops all other positions already, got 0.1",
    ),
]
BAD_USAGE = [
    ({"lse": [1.0]}, TypeError, "lse: expected a floating-point tensor, got list"),
    ({"lse": ones(2, 3).int()}, TypeError, "lse: expected a floating-point tensor, got torch.int32"),
    ({"lse": ones(2, 4)}, ValueError, "lse: expected [B, M] = [2, 3], got [2, 4]"),
    ({"lse": ones(2, 3, device="meta")}, ValueError, "lse: expected device cpu as in query_key, got meta"),
]


def named(cases):
    return pytest.mark.parametrize("change, error, message", cases, ids=[message for *_, message in cases])


@named(BAD + BAD_CHOICE)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error) as raised:
        memory_read(**GOOD | change)
    assert str(raised.value) == message


@named(BAD + BAD_USAGE)
def test_bad_input_of_a_usage_is_named(change, error, message):
    with pytest.raises(error) as raised:
        memory_usage(GOOD["query_key"], GOOD["memory_key"], **change)
    assert str(raised.value) == message


def test_a_bias_of_another_grid_is_named():
    query_key, memory = ones(2, 8, 4, 5), ones(2, 8, 3, 4, 5)
    with pytest.raises(ValueError, match=r"key_bias: expected \[B, T, H, W\] = \[2, 3, 4, 5\], got \[2, 60\]"):
        space_time_memory_read(query_key, memory, memory, key_bias=ones(2, 60))
