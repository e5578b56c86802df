"""Reads on several threads: the same read, and nothing of the caller's changed."""

import multiprocessing
import threading

import pytest
import torch

from stm_kernels import PagedMemory, memory_read, memory_usage
from stm_kernels.cpu import skip as cpu_skip
from stm_kernels.cpu import threads as cpu_threads
from stm_kernels.cpu.gemm import Scratch
from stm_kernels.cpu.threads import MIN_QUERIES, blocks_of, side_by_side
from stm_kernels.testing import make_problem

CPU = torch.device("cpu")


@pytest.fixture(params=[2, 3])
def threads(request):
    """PyTorch has so many; as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def problem(B=1, N=600):
    """Queries, keys and values in float64."""
    drawn = make_problem(B, 300, N, 16, 24, seed=3, dtype=torch.float64)
    return drawn.query_key, drawn.memory_key, drawn.memory_value


@pytest.mark.parametrize("M", [0, 1, 63, 64, 200, 1620])
@pytest.mark.parametrize("B", [1, 2, 5])
def test_blocks_cover_all_queries_once(threads, B, M):
    blocks = blocks_of(B, M, 576, CPU)
    assert [(item, query) for item, block in blocks for query in range(M)[block]] == [
        (item, query) for item in range(B) for query in range(M)
    ]
    assert all(block.stop - block.start <= 576 for _, block in blocks)
    if M == 1620:
        assert len(blocks) % threads == 0
        assert min(block.stop - block.start for _, block in blocks) >= MIN_QUERIES


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"skip": 1e-3}, {"similarity": "l2"}])
def test_a_read_and_its_gradients_are_those_of_one_thread(threads, options):
    inputs = [tensor.requires_grad_() for tensor in problem(B=2, N=3000)]
    found = []
    for count in (1, threads):
        torch.set_num_threads(count)
        out, lse = memory_read(*inputs, return_lse=True, **options)
        found.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs)))
    for one, several in zip(*found):
        torch.testing.assert_close(several, one, rtol=1e-10, atol=1e-12)


def test_what_is_skipped_is_that_of_one_thread(threads, monkeypatch):
    for name, limit in (("MIN_MULTIPLICATIONS", 0), ("GATHERED_CHANNELS", 1), ("MAX_GATHERED", 2.0)):
        monkeypatch.setattr(cpu_skip, name, limit)
    query_key, memory_key, memory_value = problem(B=2, N=3000)
    # the newer half weighs nearly all
    query_key[:, :, 0] = 4
    memory_key[:, 1500:, 0] += 12
    found = []
    for count in (1, threads):
        torch.set_num_threads(count)
        found.append(memory_read(query_key, memory_key, memory_value, skip=1e-2, return_lse=True, return_skipped=True))
    assert found[0][2].max() > 0
    for one, several in zip(*found):
        torch.testing.assert_close(several, one, rtol=1e-6, atol=1e-9)


def test_usage_of_a_read_of_pages_is_that_of_one_thread(threads):
    query_key, memory_key, memory_value = problem(B=2, N=3000)
    found = []
    for count in (1, threads):
        torch.set_num_threads(count)
        memory = PagedMemory(2, 16, 24, dtype=torch.float64, page_size=1000)
        memory.append(memory_key, memory_value)
        found.append(memory.read(query_key, return_usage=True))
    for one, several in zip(*found):
        torch.testing.assert_close(several, one, rtol=1e-10, atol=1e-12)


def test_usage_is_that_of_one_thread(threads):
    query_key, memory_key, _ = problem(B=2, N=3000)
    usage = memory_usage(query_key, memory_key)
    torch.set_num_threads(1)
    torch.testing.assert_close(usage, memory_usage(query_key, memory_key), rtol=1e-10, atol=1e-12)


def test_every_thread_computes_alone_and_the_others_keep_their_threads(threads):
    # its own threads are new ones
    cpu_threads._pool.cache_clear()
    seen = side_by_side(lambda tasks, _: (len(tasks), torch.get_num_threads()), range(7), CPU)
    assert [count for count, _ in seen] == [len(range(7)[first::threads]) for first in range(threads)]
    assert {alone for _, alone in seen} == {1}
    new = []
    thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert torch.get_num_threads() == new[0] == threads


def test_modes_are_those_of_the_caller(threads):
    def modes(tasks, scratch):
        assert isinstance(scratch, Scratch)
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    assert set(side_by_side(modes, range(9), CPU)) == {(False, False)}
    with torch.inference_mode():
        assert set(side_by_side(modes, range(9), CPU)) == {(True, False)}
        assert memory_read(*problem()).is_inference()


def test_an_error_is_the_caller_s(threads):
    def fail(tasks, _):
        if 1 in tasks:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        side_by_side(fail, range(9), CPU)
    assert sum(side_by_side(lambda tasks, _: sum(tasks), range(9), CPU)) == 36


def _read_in_child(queue):
    torch.set_num_threads(2)
    queue.put(memory_read(*problem()).sum().item())


def test_a_forked_process_has_threads_of_its_own(threads):
    here = memory_read(*problem()).sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == pytest.approx(here, rel=1e-5)
    child.join()
