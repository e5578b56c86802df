"""The CPU implementation: its chunks, its buffers, its dtypes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import stm_kernels.cpu.chunked as chunked
import stm_kernels.cpu.select as cpu_select
import stm_kernels.cpu.usage as cpu_usage
from stm_kernels import memory_read
from stm_kernels.affinity import Affinity
from stm_kernels.cpu import flash, gemm
from stm_kernels.cpu.gemm import even_slices, steady_slices
from stm_kernels.cpu.usage import chunked_read_with_usage, chunked_usage
from stm_kernels.testing import allocations, assert_exact, extra_memory, make_problem, read_by, results


@pytest.fixture(autouse=True)
def without_tiles(monkeypatch):
    """Where the processor has matrix tiles, bfloat16 is not read in chunks."""
    monkeypatch.setattr(flash, "has_tiles", lambda: False)


def test_slices_cover_a_range_evenly():
    assert even_slices(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert even_slices(8, 5) == [slice(0, 4), slice(4, 8)]
    assert even_slices(3, 100) == [slice(0, 3)]


def test_slices_of_a_memory_of_frames():
    assert steady_slices(12, 4, 9) == [slice(0, 8), slice(8, 12)]
    assert steady_slices(20, 10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)] + [
        slice(10, 14),
        slice(14, 18),
        slice(18, 20),
    ]
    assert steady_slices(7, 30, 10) == [slice(0, 7)]
    assert steady_slices(0, 30, 10) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries, keys", [(16, 1000), (1000, 7), (13, 29)])
def test_any_block_and_chunk_gives_the_same_read(monkeypatch, dtype, queries, keys):
    monkeypatch.setattr(chunked, "QUERIES_PER_BLOCK", queries)
    monkeypatch.setattr(chunked, "KEYS_PER_CHUNK", keys)
    monkeypatch.setattr(chunked, "BACKWARD_KEYS_PER_CHUNK", (1, keys))
    assert_exact(make_problem(2, 70, 150, 32, 24, dtype=dtype, peak=2.0), read_by("chunked"))


def test_bfloat16_where_the_processor_does_not_multiply_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert_exact(make_problem(2, 70, 150, 32, 24, dtype=torch.bfloat16), read_by("chunked"))


def test_bfloat16_products_of_keys_keep_more_than_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(gemm, "mkl_holds_back", lambda: False)
    problem = make_problem(1, 70, 300, 128, 16, dtype=torch.bfloat16, peak=8.0)
    _, lse = memory_read(
        problem.query_key, problem.memory_key, problem.memory_value, return_lse=True, implementation="chunked"
    )
    truth = results(problem.to(torch.float64), gradients=False)["lse"]
    # two bfloat16 parts hold 16 bits
    assert (lse - truth).abs().max() <= 2**-16 * truth.abs().max()


def test_float64_is_exact_to_float64():
    problem = make_problem(2, 70, 1500, 32, 24, dtype=torch.float64)
    truth = results(problem)
    for name, found in results(problem, read_by("chunked")).items():
        # sums of at most N terms
        torch.testing.assert_close(found, truth[name], rtol=0, atol=1500 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channel_major", [False, True], ids=["token_major", "channel_major"])
def test_extra_memory_of_a_read_does_not_grow_with_the_memory(dtype, channel_major):
    def extra(N: int) -> int:
        problem = make_problem(1, 64, N, 32, 64, dtype=dtype, channel_major=channel_major)
        inputs = (problem.query_key, problem.memory_key, problem.memory_value)
        return extra_memory(lambda: memory_read(*inputs, implementation="chunked"))

    assert extra(8 * chunked.KEYS_PER_CHUNK) == extra(2 * chunked.KEYS_PER_CHUNK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channel_major", [False, True], ids=["token_major", "channel_major"])
def test_extra_memory_of_a_backward_grows_by_the_gradients_alone(dtype, channel_major):
    def extra(N: int) -> int:
        problem = make_problem(1, 64, N, 32, 64, dtype=dtype, channel_major=channel_major)
        inputs = (Affinity(problem.query_key, problem.memory_key, problem.scale), problem.memory_value)
        outputs = chunked.chunked_read(*inputs)
        arguments = (problem.grad_out, problem.grad_lse.double(), *inputs, *outputs, 0.0)
        gradients = problem.memory_key.nbytes + problem.memory_value.nbytes
        return extra_memory(lambda: chunked.chunked_read_backward(*arguments)) - gradients

    most = chunked.BACKWARD_KEYS_PER_CHUNK[1]
    assert extra(6 * most) == extra(2 * most)


# not bfloat16, and not the other library for float32: they take memory of their own at every call
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_chunks_share_their_buffers(dtype, monkeypatch):
    monkeypatch.setattr(gemm, "mkl_holds_back", lambda: False)

    def count(N: int) -> int:
        problem = make_problem(1, 64, N, 32, 64, dtype=dtype)
        inputs = (Affinity(problem.query_key, problem.memory_key, problem.scale), problem.memory_value)

        def read_and_backward():
            outputs = chunked.chunked_read(*inputs)
            chunked.chunked_read_backward(problem.grad_out, problem.grad_lse.double(), *inputs, *outputs, 0.0)

        # a maximum or a sum of a row is small; a buffer is not
        return sum(size > 4096 for size in allocations(read_and_backward))

    most = chunked.BACKWARD_KEYS_PER_CHUNK[1]
    assert count(6 * most) == count(2 * most)


class Products(TorchDispatchMode):
    """The sizes of all matrix products: a library may compile each, and keep it. And the smallest factor but 0."""

    def __init__(self):
        super().__init__()
        self.sizes = set()
        self.smallest = torch.inf

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.mkldnn._linear_pointwise):
            factors = [value for value in args if isinstance(value, torch.Tensor)]
            self.sizes.add((operator, *(tuple(value.shape) for value in factors)))
            found = [value[value != 0].abs().amin().item() for value in factors[-2:] if value.any()]
            self.smallest = min([self.smallest, *found])
        return operator(*args, **(kwargs or {}))


def test_no_product_has_subnormal_numbers(monkeypatch):
    monkeypatch.setattr(chunked, "KEYS_PER_CHUNK", 64)
    # logits of ±70: weights end at e^-140, float32 at e^-87 and, subnormal, at e^-103
    problem = make_problem(1, 16, 300, 32, 24, peak=22.0)
    assert_exact(problem, read_by("chunked"))
    affinity = Affinity(problem.query_key, problem.memory_key, problem.scale)
    with Products() as products:
        outputs = chunked.chunked_read(affinity, problem.memory_value)
        chunked.chunked_read_backward(problem.grad_out, problem.grad_lse, affinity, problem.memory_value, *outputs, 0.0)
    assert 0 < products.smallest < torch.inf and products.smallest > torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [50, 90, 300])
def test_a_memory_that_grows_by_frames_needs_no_ever_new_products(monkeypatch, dtype, M):
    monkeypatch.setattr(chunked, "KEYS_PER_CHUNK", 128)
    monkeypatch.setattr(chunked, "BACKWARD_KEYS_PER_CHUNK", (64, 128))
    monkeypatch.setattr(cpu_select, "KEYS_PER_CHUNK", 128)
    monkeypatch.setattr(cpu_usage, "KEYS_PER_CHUNK", 128)

    def sizes(most: int) -> set:
        with Products() as products:
            for frames in range(1, most + 1):
                problem = make_problem(1, M, frames * M, 8, 8, dtype=dtype)
                affinity = Affinity(problem.query_key, problem.memory_key, problem.scale)
                inputs = (affinity, problem.memory_value)
                outputs = chunked.chunked_read(*inputs)
                chunked.chunked_read_backward(problem.grad_out, problem.grad_lse.double(), *inputs, *outputs, 0.0)
                chunked_usage(affinity, None)
                chunked_read_with_usage([affinity], [problem.memory_value])
                cpu_select.chunked_select(affinity, 5)
        assert len(products.sizes) >= 3
        return products.sizes

    assert sizes(11) == sizes(4)


def test_extra_memory_is_a_tenth_of_the_whole_affinity():
    problem = make_problem(1, 900, 9000, 32, 128)

    def extra(implementation: str) -> int:
        inputs = (problem.query_key, problem.memory_key, problem.memory_value)
        return extra_memory(lambda: memory_read(*inputs, implementation=implementation))

    assert extra("reference") >= 900 * 9000 * 4
    assert extra("chunked") <= extra("reference") / 10


@pytest.mark.parametrize("channel_major", [False, True], ids=["token_major", "channel_major"])
def test_gradients_lie_in_memory_as_their_inputs_do(channel_major):
    problem = make_problem(2, 7, 30, 8, 12, channel_major=channel_major)
    found = results(problem, read_by("chunked"))
    for name in ("query_key", "memory_key", "memory_value"):
        assert found[f"grad_{name}"].stride() == getattr(problem, name).stride()
