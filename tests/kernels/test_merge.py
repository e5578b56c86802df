"""Partial reads, merged."""

import pytest
import torch

from stm_kernels import memory_read, merge_reads
from stm_kernels.gpu.merge import triton_merge
from stm_kernels.reference import reference_read
from stm_kernels.testing import assert_exact, make_problem


def read_in_parts(query_key, memory_key, memory_value, scale, cuts=(0, 20, 20, 130, 150), read=reference_read):
    """Read `[cut, next cut)` one by one and merge; the second part is empty."""
    parts = [
        read(query_key, memory_key[:, start:end], memory_value[:, start:end], scale)
        for start, end in zip(cuts, cuts[1:])
    ]
    return merge_reads(*(torch.stack(tensors) for tensors in zip(*parts)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("peak", [1.0, 5.0])
def test_merge_of_parts_is_the_whole(dtype, peak):
    assert_exact(make_problem(2, 40, 150, 32, 24, dtype=dtype, peak=peak), read_in_parts)


def test_merge_of_chunked_reads_is_differentiable():
    problem = make_problem(1, 3, 20, 3, 2, dtype=torch.float64)

    def read(query_key, memory_key, memory_value, scale):
        return memory_read(query_key, memory_key, memory_value, scale=scale, return_lse=True)

    inputs = (problem.query_key, problem.memory_key, problem.memory_value)
    torch.autograd.gradcheck(
        lambda *inputs: read_in_parts(*inputs, problem.scale, (0, 5, 5, 12, 20), read),
        [t.requires_grad_() for t in inputs],
    )


def test_a_row_that_no_part_sees():
    outs = torch.randn(3, 1, 2, 4, requires_grad=True)
    lses = torch.randn(3, 1, 2)
    lses[:, 0, 1] = -torch.inf
    lses.requires_grad_()
    out, lse = merge_reads(outs, lses)
    assert out[0, 1].equal(torch.zeros(4)) and lse[0, 1] == -torch.inf
    assert out[0, 0].isfinite().all() and lse[0, 0].isfinite()
    grads = torch.autograd.grad(out.sum() + lse[:, 0].sum(), [outs, lses])
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:, 0, 1].any() and not grads[1][:, 0, 1].any()


def test_large_log_sum_exps_neither_overflow_nor_vanish():
    outs = torch.tensor([1.0, 2.0, 4.0])[:, None, None, None]
    for level in (-1e4, 0.0, 1e4):
        out, lse = merge_reads(outs, torch.tensor([level, level, -torch.inf])[:, None, None])
        assert out.item() == pytest.approx(1.5)
        assert lse.item() == pytest.approx(level + 0.6931472)


def test_result_has_the_dtype_of_the_parts():
    outs, lses = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3)
    out, lse = merge_reads(outs.bfloat16(), lses)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    # weighed in float32, rounded once
    assert out.equal(merge_reads(outs.bfloat16().float(), lses)[0].bfloat16())


@pytest.mark.parametrize("outs, lses", [((2, 1, 3), (2, 1, 3)), ((2, 1, 3, 4), (2, 1, 4)), ((2, 1, 3, 4), (2, 3))])
def test_shapes_that_disagree(outs, lses):
    with pytest.raises(ValueError, match=r"lses: expected \[S, B, M\] of outs \[S, B, M, V\], got"):
        merge_reads(torch.zeros(outs), torch.zeros(lses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("level", [0.0, 1e4])
def test_the_kernel_merges_alike(device, dtype, level):
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(5, 2, 37, 70, generator=generator).to(device)
    lses = (torch.randn(5, 2, 37, generator=generator, dtype=torch.float64) * 3 + level).to(device)
    # a part and, in all parts, rows that see nothing
    lses[1] = lses[:, 1, 7:9] = -torch.inf
    outs[lses.isneginf()] = 0.0
    out, lse = triton_merge(outs, lses, dtype)
    expected_out, expected_lse = merge_reads(outs.double(), lses)
    assert out.dtype == dtype and lse.dtype == torch.float64
    assert not out[1, 7:9].any()
    # float32 weights of float64 differences, and one rounding of the result
    rounding = max(torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(out.double(), expected_out, rtol=0, atol=rounding * outs.abs().max().item())
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=8 * torch.finfo(torch.float32).eps)
