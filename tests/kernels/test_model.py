"""What the predictions count, on machine code whose counts are known."""

import json

import pytest

pytest.importorskip("triton")

import stm_kernels.gpu.model as model
from stm_kernels.gpu.launch import Launch
from stm_kernels.gpu.model import Work

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
# bound by products, not by shared memory
LIGHT = LOOP.replace(".128 [R8]", " [R8]").replace("88.4", "88")
GROUPS = """
.L_x_0:
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R152, gdesc[UR8], R152 ;
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
"""


def predicted(monkeypatch, code, architecture, registers=128, shared=80.0, stack=0, **work):
    monkeypatch.setattr(model, "machine_code", lambda *_: (code, registers, stack, shared))
    settings = {"operations": 2**20, "read_bytes": 0, "programs": 108 * 4, "iterations": 10, "moved_bytes": 0} | work
    return model.predict(Work(Launch(None, (1,), {}, 4, 1), **settings), architecture)


def test_an_iteration_on_an_a100(monkeypatch):
    found = predicted(monkeypatch, LOOP, "sm_80")
    # 4 warps: 2 products of 4096 operations each, 512 bytes twice, 32 lanes
    assert found.cycles == {
        "tensor": 16, "FP32": 2, "integer": 2, "exponential": 8, "shared memory": 32, "issue": 8
    }  # fmt: skip
    assert found.bound == "shared memory" and found.at_once == 2
    assert found.tflops(True) == found.tflops(False) == pytest.approx(2**20 / 32 * 108 * 1.41e-3)


def test_products_and_arithmetic_at_once_or_apart(monkeypatch):
    found = predicted(monkeypatch, LIGHT, "sm_80")
    assert found.cycles["shared memory"] == 8
    assert found.tflops(True) == pytest.approx(2**20 / 16 * 108 * 1.41e-3)
    assert found.tflops(False) == pytest.approx(2**20 / 24 * 108 * 1.41e-3)


def test_the_last_programs_leave_multiprocessors_idle(monkeypatch):
    for code in (LOOP, LIGHT):
        whole = predicted(monkeypatch, code, "sm_80", programs=216).tflops(True)
        assert predicted(monkeypatch, code, "sm_80", programs=217).tflops(True) == pytest.approx(whole * 217 / 324)


def test_what_all_multiprocessors_share(monkeypatch):
    # 5120 bytes a cycle for 108 of them
    found = predicted(monkeypatch, LOOP, "sm_80", read_bytes=5120)
    assert found.beyond["L2"] == 108 and found.bound == "L2"
    assert found.tflops(True) == pytest.approx(2**20 * 1.41e-3)
    # a second for all of the memory
    found = predicted(monkeypatch, LOOP, "sm_80", moved_bytes=1555 * 10**9)
    assert found.bound == "memory" and found.tflops(True) == pytest.approx(2**20 * 4320 / 1e12)


def test_what_spills_or_does_not_fit_is_not_predicted(monkeypatch):
    assert predicted(monkeypatch, LOOP, "sm_80", stack=8) is predicted(monkeypatch, LOOP, "sm_80", shared=164.0) is None


def test_products_of_warp_groups(monkeypatch):
    # 32 cycles both for products and for the two operands; 128 for products of which one operand is in registers
    assert predicted(monkeypatch, GROUPS, "sm_90").cycles["tensor"] == 32 + 128


@pytest.mark.parametrize(
    "registers, shared, programs", [(255, 10.0, 2), (128, 10.0, 4), (32, 10.0, 14), (32, 163.0, 1)]
)
def test_programs_at_once(monkeypatch, registers, shared, programs):
    assert predicted(monkeypatch, LOOP, "sm_80", registers, shared).at_once == programs


def test_the_read_is_all_that_is_useful():
    work = model.read("sm_80")
    assert work.operations * work.programs * work.iterations == pytest.approx(2 * 2 * 1620 * 32400 * (128 + 512))
    # each program's part of the memory, for each of its slices
    tiles = model.ForwardTiles(64, 64, 128, 4, 2)
    narrow = model.read("sm_80", tiles)
    assert narrow.programs % (4 * 26 * 2) == 0 and narrow.read_bytes == 2 * 64 * 256
    assert narrow.programs // (4 * 26 * 2) * narrow.iterations * 64 >= 32400


def test_a_sweep_is_written_best_first(monkeypatch, tmp_path):
    monkeypatch.setattr(model, "machine_code", lambda launch, _: (LOOP, 32 * launch.num_warps, 0, 80.0))
    model.sweep(["sm_80"], tmp_path / "tiles.json", 128, 512)
    found = json.loads((tmp_path / "tiles.json").read_text())
    rates = [one["apart"] for one in found["sm_80"]]
    assert rates == sorted(rates, reverse=True) and len(rates) == len(model.choices("sm_80", 512))
    assert sum(one["default"] for one in found["sm_80"]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["tiles.json"]
