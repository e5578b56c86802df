"""Matrix products of the reads in plain PyTorch: which library multiplies, and that it makes no difference."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stm_kernels import memory_read
from stm_kernels.cpu import gemm
from stm_kernels.cpu import skip as cpu_skip
from stm_kernels.testing import assert_exact, make_problem, read_by, results

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture(params=["usual", pytest.param("onednn", marks=needs_onednn)])
def library(request, monkeypatch) -> str:
    monkeypatch.setattr(gemm, "mkl_holds_back", lambda: request.param == "onednn")
    monkeypatch.setattr(gemm, "ONEDNN_MULTIPLICATIONS", 1)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("top_k", [None, 20])
def test_reads_are_exact_by_either_library(library, dtype, top_k):
    problem = make_problem(2, 70, 150, 32, 24, dtype=dtype, peak=2.0)
    assert_exact(replace(problem, top_k=top_k), read_by("chunked"))


@needs_onednn
def test_what_is_left_out_is_the_same_by_either_library(monkeypatch):
    monkeypatch.setattr(gemm, "ONEDNN_MULTIPLICATIONS", 1)
    monkeypatch.setattr(cpu_skip, "MIN_MULTIPLICATIONS", 0)
    monkeypatch.setattr(cpu_skip, "GATHERED_CHANNELS", 1)
    monkeypatch.setattr(cpu_skip, "MAX_GATHERED", 2.0)
    problem = make_problem(2, 70, 400, 32, 24)
    # the newer half weighs nearly all
    problem.query_key[:, :, 0] = 32**0.5
    problem.memory_key[:, 200:, 0] += 12
    inputs = (problem.query_key, problem.memory_key, problem.memory_value)
    found = []
    for held_back in (False, True):
        monkeypatch.setattr(gemm, "mkl_holds_back", lambda held_back=held_back: held_back)
        skipped = memory_read(*inputs, skip=1e-2, return_skipped=True, implementation="chunked")[1]
        assert skipped.max() > 0
        found.append(results(problem, read_by("chunked", skip=1e-2)) | {"skipped": skipped})
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("turned", [(left, right) for left in (False, True) for right in (False, True)])
def test_a_product_of_matrices_laid_out_either_way(library, turned):
    left, right = (
        torch.randn(shape[::-1]).mT if turn else torch.randn(shape)
        for shape, turn in zip([(33, 70), (70, 21)], turned, strict=True)
    )
    truth = 0.5 * left.double() @ right.double()
    found = gemm.product("any", left, right, gemm.Scratch(left.device), 0.5)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=70 * 2**-23)


def test_a_slice_of_a_larger_matrix_is_multiplied_alone(library):
    left, right = torch.randn(40, 50)[3:30, 7:20], torch.randn(13, 90)[:, 5:64]
    found = gemm.product("any", left, right, gemm.Scratch(left.device))
    torch.testing.assert_close(found.double(), left.double() @ right.double(), rtol=0, atol=13 * 2**-21)


@needs_onednn
@pytest.mark.parametrize("turned", [False, True])
def test_onednn_is_given_no_matrix_with_gaps(monkeypatch, turned):
    class Weights(TorchDispatchMode):
        seen = None

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.overloadpacket is torch.ops.mkldnn._linear_pointwise:
                self.seen = args[1]
            return operator(*args, **(kwargs or {}))

    monkeypatch.setattr(gemm, "mkl_holds_back", lambda: True)
    monkeypatch.setattr(gemm, "ONEDNN_MULTIPLICATIONS", 1)
    right = torch.randn(90, 70)[5:64, 7:20].mT if turned else torch.randn(30, 90)[7:20, 5:64]
    with Weights() as weights:
        gemm.product("any", torch.randn(27, 13), right, gemm.Scratch(right.device))
    assert weights.seen.is_contiguous() or weights.seen.mT.is_contiguous()


def test_only_large_float32_products_change_the_library(monkeypatch):
    monkeypatch.setattr(gemm, "mkl_holds_back", lambda: True)
    large, small = torch.ones(256, 256), torch.ones(16, 16)
    assert gemm.by_onednn(large, large)
    assert not gemm.by_onednn(small, small)
    assert not gemm.by_onednn(large.double(), large.double())
    assert not gemm.by_onednn(large.bfloat16(), large.bfloat16())


@pytest.mark.parametrize(
    "maker, capability, expected",
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False)],
)
def test_the_library_goes_by_the_processor(monkeypatch, tmp_path, maker, capability, expected):
    processor = tmp_path / "cpuinfo"
    processor.write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    monkeypatch.setattr(gemm, "PROCESSOR", processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    assert gemm.mkl_holds_back.__wrapped__() is expected
