"""What is judged by its machine code computes the read."""

import math
import re

import pytest
import torch

pytest.importorskip("triton")

if torch.cuda.is_available():
    pytest.skip("in the interpreter a product in float32 is one", allow_module_level=True)

import triton
import triton.language as tl

import bench.variants as variants
import stm_kernels.gpu.model as model
from bench.variants import Variant, exp2_by_polynomial, with_variant
from stm_kernels.affinity import Affinity
from stm_kernels.gpu.forward import forward_launch
from stm_kernels.gpu.machine_code import main_loop
from stm_kernels.gpu.tma import descriptor_launch
from stm_kernels.gpu.tuning import ForwardTiles
from stm_kernels.testing import assert_exact, make_problem

VARIANTS = [
    Variant(threshold=8.0),
    Variant(polynomial=8),
    Variant(polynomial=2),
    Variant(shared_weights=True),
    Variant(threshold=8.0, polynomial=4, shared_weights=True),
]


def read_as(variant: Variant, kind: str):
    """A read by one variant."""
    tiles = ForwardTiles(32, 32, 32, 4, 2, kind)

    def read(query_key, memory_key, memory_value, *, scale):
        affinity = Affinity(query_key, memory_key, scale)
        B, M, C = query_key.shape
        out = query_key.new_empty(1, B, M, memory_value.shape[2])
        lse = query_key.new_empty(1, B, M, dtype=torch.float64)
        N = memory_key.shape[1]
        if kind == "descriptor":
            launch = descriptor_launch(affinity, memory_value, out, lse, tiles, N)
        else:
            nothing, skipped = query_key.new_empty(B, 0, dtype=torch.uint8), lse.float()
            launch = forward_launch(affinity, memory_value, out, lse, skipped, nothing, 0.0, tiles, N)
        with_variant(launch, variant, C).run(query_key.device)
        return out[0], lse[0]

    return read


def rising_problem():
    """Logits grow along the memory, by more than float16 has room for above a maximum that stays."""
    problem = make_problem(1, 45, 140, 24, 40, dtype=torch.float16, peak=2.0)
    problem.memory_key.mul_(torch.linspace(0, 8, 140)[:, None])
    return problem


@pytest.mark.parametrize("kind", ["portable", "descriptor"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_variant_is_the_read(variant, kind):
    for problem in (rising_problem(), make_problem(2, 40, 70, 24, 40, dtype=torch.float16)):
        assert_exact(problem, read_as(variant, kind), gradients=False)


@triton.jit
def exp2_kernel(in_ptr, out_ptr, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    tl.store(out_ptr + places, exp2_by_polynomial(tl.load(in_ptr + places)))


def test_the_polynomial_errs_less_than_bfloat16():
    exponents = torch.cat([torch.linspace(-126, 0, 4095), torch.tensor([-math.inf])])
    found = torch.empty(4096)
    exp2_kernel[1,](exponents, found, 4096)
    truth = exponents.double().clamp(min=-126).exp2()
    assert ((found - truth).abs() / truth).max() < 1.1e-4


LOOP = """
.L_x_0:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   FMUL R4, R4, R5 ;
.L_x_1:
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0050*/                   EXIT ;
"""


def test_an_iteration_that_rescales_and_one_that_does_not(monkeypatch, capsys):
    fmul = "        /*0020*/                   FMUL R4, R4, R5 ;\n"
    code = LOOP.replace(fmul, 2000 * fmul)
    for module in (model, variants):
        monkeypatch.setattr(module, "machine_code", lambda *_: (code, 128, 0, 80.0))
    assert variants.main(["--architecture", "sm_80"]) == 0
    rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()[1:]]
    rates = {name: int(apart) for _, sizes, name, _, _, apart, *_ in rows if sizes == "128, 512"}
    assert rates["threshold, not rescaling"] > rates["threshold, rescaling"] == rates["polynomial, 1 in 2"]
    assert rates["the read"] == rates["threshold, rescaling"]


def test_what_a_branch_jumps_over_is_left_out():
    assert [line.split()[0] for line in main_loop(LOOP)] == ["HMMA.16816.F32.BF16", "BRA", "FMUL", "BRA", "BRA"]
    assert [line.split()[0] for line in main_loop(LOOP, jumps=True)] == ["HMMA.16816.F32.BF16", "BRA", "BRA", "BRA"]
