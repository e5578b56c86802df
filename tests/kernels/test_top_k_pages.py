"""The read of the k best positions of a memory in pages."""

import pytest
import torch
from top_k_cases import device_of, each_case, small_chunks, whole_numbered  # noqa: F401

from stm_kernels import PagedMemory, memory_read
from stm_kernels.testing import make_problem


def in_pages(problem, page_size):
    (B, _, C), V = problem.memory_key.shape, problem.memory_value.shape[2]
    memory = PagedMemory(B, C, V, page_size=page_size, dtype=problem.memory_key.dtype, device=problem.memory_key.device)
    memory.append(problem.memory_key, problem.memory_value)
    return memory


@each_case
@pytest.mark.parametrize("page_size", [4, 20, 64])
def test_pages_are_read_as_one_memory(implementation, dtype, page_size):
    problem = make_problem(2, 7, 64, 16, 24, dtype=dtype, device=device_of(implementation))
    problem = whole_numbered(problem, 9)
    memory = in_pages(problem, page_size)
    options = {"scale": 0.5, "top_k": 9, "return_lse": True}
    found = memory.read(problem.query_key, implementation=implementation, **options)
    tensors = (problem.query_key, problem.memory_key, problem.memory_value)
    truth = memory_read(*(tensor.double() for tensor in tensors), implementation="reference", **options)
    whole = memory_read(*tensors, implementation=implementation, **options)
    for one, other, true in zip(found, whole, truth):
        # a page's read is rounded once more, and so is every merge
        roundings = torch.finfo(one.dtype).eps + torch.finfo(torch.float32).eps * (64 // page_size)
        assert one.dtype == other.dtype
        assert (one - true).abs().max() <= (other - true).abs().max() + roundings * true.abs().max()
    gathered = memory.read(problem.query_key, implementation="reference", **options)
    assert gathered[0].equal(memory_read(*tensors, implementation="reference", **options)[0])


def test_no_queries_read_nothing_of_pages():
    problem = make_problem(2, 0, 12, 4, 3)
    out, lse = in_pages(problem, 5).read(problem.query_key, top_k=3, return_lse=True)
    assert out.shape == (2, 0, 3) and lse.shape == (2, 0)


def test_pages_are_not_differentiated():
    problem = make_problem(1, 2, 12, 4, 3, dtype=torch.float64)
    query_key = problem.query_key.requires_grad_()
    with pytest.raises(ValueError, match="query_key: expected no gradients of top_k in several pages"):
        in_pages(problem, 5).read(query_key, top_k=3)
    with torch.no_grad():
        in_pages(problem, 5).read(query_key, top_k=3)
    torch.autograd.gradcheck(lambda query: in_pages(problem, 12).read(query, top_k=3), query_key)
    with pytest.raises(ValueError, match="top_k: expected at least 1, got 0"):
        in_pages(problem, 5).read(query_key.detach(), top_k=0)
