"""What the predictions count, on machine code whose counts are known."""

import pytest

pytest.importorskip("triton")

import stm_kernels.gpu.model as model
from stm_kernels.gpu.launch import Launch

LOOP = """
.L_x_0:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   LDSM.16.M88.4 R4, [R8] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R8], [R4.64] ;
        /*0040*/                   MUFU.EX2 R4, R4 ;
        /*0050*/                   FFMA R4, R4, R4, R4 ;
        /*0060*/                   FMNMX R4, R4, R4, !PT ;
        /*0070*/               @P0 BRA `(.L_x_0) ;
        /*0080*/                   MUFU.EX2 R4, R4 ;
"""
GROUPS = """
.L_x_0:
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R152, gdesc[UR8], R152 ;
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
"""


def predicted(monkeypatch, code, architecture, registers=128, shared=80.0):
    monkeypatch.setattr(model, "machine_code", lambda *_: (code, registers, 0, shared))
    return model.predict(Launch(None, (1,), {}, 4, 1), architecture, 2**20)


def test_an_iteration_on_an_a100(monkeypatch):
    found = predicted(monkeypatch, LOOP, "sm_80")
    # 4 warps: 2 products of 4096 operations each, 512 bytes twice, 32 lanes
    assert found.cycles == {
        "tensor": 16, "FP32": 2, "integer": 2, "exponential": 8, "shared memory": 32, "issue": 8
    }  # fmt: skip
    assert found.bound == "shared memory" and found.programs == 2
    assert found.tflops(True) == pytest.approx(2**20 / 32 * 108 * 1.41e-3)
    assert found.tflops(False) == pytest.approx(2**20 / 48 * 108 * 1.41e-3)


def test_products_of_warp_groups(monkeypatch):
    # 32 cycles both for products and for the two operands; 128 for products of which one operand is in registers
    assert predicted(monkeypatch, GROUPS, "sm_90").cycles["tensor"] == 32 + 128


@pytest.mark.parametrize(
    "registers, shared, programs", [(255, 10.0, 2), (128, 10.0, 4), (32, 10.0, 14), (32, 163.0, 1)]
)
def test_programs_at_once(monkeypatch, registers, shared, programs):
    assert predicted(monkeypatch, LOOP, "sm_80", registers, shared).programs == programs
