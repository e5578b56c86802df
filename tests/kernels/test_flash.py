"""The bfloat16 read by PyTorch's flash attention, on any processor."""

import pytest
import torch

from stm_kernels import memory_read
from stm_kernels.affinity import Affinity
from stm_kernels.cpu import flash
from stm_kernels.testing import assert_exact, extra_memory, make_problem, read_by, results


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    monkeypatch.setattr(flash, "has_tiles", lambda: True)


@pytest.mark.parametrize("per_call", [1000, 64])
@pytest.mark.parametrize("C, V", [(32, 24), (64, 128), (20, 32), (96, 33)])
@pytest.mark.parametrize(
    "form",
    [{}, {"similarity": "l2"}, {"biased": True, "ragged": True}, {"similarity": "l2", "biased": True, "peak": 6.0}],
    ids=["dot", "l2", "bias and lengths", "l2, bias, peaks"],
)
@pytest.mark.parametrize("channel_major", [False, True], ids=["token_major", "channel_major"])
def test_equals_the_definition(monkeypatch, form, C, V, per_call, channel_major):
    monkeypatch.setattr(flash, "POSITIONS_PER_CALL", per_call)
    problem = make_problem(2, 70, 150, C, V, dtype=torch.bfloat16, channel_major=channel_major, **form)
    assert_exact(problem, read_by("chunked"))


def test_a_bias_keeps_what_float32_has_of_it():
    # logits that differ by less than bfloat16 has digits for
    problem = make_problem(1, 40, 300, 32, 32, dtype=torch.bfloat16)
    bias = 1000 + torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    inputs = (problem.query_key, problem.memory_key, problem.memory_value)
    _, lse = memory_read(*inputs, key_bias=bias, return_lse=True)
    wide = [each.double() for each in inputs]
    _, truth = memory_read(*wide, key_bias=bias.double(), return_lse=True, implementation="reference")
    # the three channels hold 24 bits, and sums of 35 products are as exact as float32
    assert (lse - truth).abs().max() <= 40 * torch.finfo(torch.float32).eps * truth.abs().max()


def test_a_memory_that_is_hidden_whole_gives_zeros():
    problem = make_problem(1, 5, 30, 16, 16, dtype=torch.bfloat16)
    hidden = torch.full((1, 30), -torch.inf)
    inputs = (problem.query_key, problem.memory_key, problem.memory_value)
    out, lse = memory_read(*inputs, key_bias=hidden, return_lse=True)
    assert not out.any() and lse.isneginf().all()


def test_what_is_hidden_may_be_nan():
    problem = make_problem(1, 5, 30, 16, 16, dtype=torch.bfloat16, biased=True)
    out, _ = read_by("chunked")(
        problem.query_key, problem.memory_key, problem.memory_value, key_bias=problem.key_bias, **problem.options()
    )
    for tensor in (problem.memory_key, problem.memory_value):
        tensor[:, ::3] = torch.nan
    again, _ = read_by("chunked")(
        problem.query_key, problem.memory_key, problem.memory_value, key_bias=problem.key_bias, **problem.options()
    )
    assert torch.equal(out, again)


def test_read_by_it_is_what_it_reads_faster(monkeypatch):
    def reads(V, **form):
        problem = make_problem(1, 8, 16, 32, V, **form)
        return flash.flash_reads(Affinity(problem.query_key, problem.memory_key, 1.0), problem.memory_value)

    assert reads(640, dtype=torch.bfloat16)
    assert not reads(641, dtype=torch.bfloat16) and not reads(64, dtype=torch.float32)
    monkeypatch.setattr(flash, "has_tiles", lambda: False)
    assert not reads(64, dtype=torch.bfloat16)


def test_extra_memory_does_not_grow_with_the_memory(monkeypatch):
    monkeypatch.setattr(flash, "POSITIONS_PER_CALL", 500)

    def extra(N):
        problem = make_problem(1, 64, N, 32, 64, dtype=torch.bfloat16)
        return extra_memory(lambda: results(problem, read_by("chunked"), gradients=False))

    assert extra(8000) == extra(2000)
