"""What the predictions count, on machine code whose counts are known."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import stm_kernels.gpu.model as model
from stm_kernels.gpu.defaults import default_launches
from stm_kernels.gpu.forms import FORMS, Work
from stm_kernels.gpu.launch import Launch
from stm_kernels.gpu.tuning import ForwardTiles

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


@pytest.mark.parametrize("architecture", model.GPUS)
@pytest.mark.parametrize("form", FORMS)
def test_no_more_than_the_useful_operations_count(form, architecture):
    for C, V in ((128, 512), (64, 128)):
        tiles = FORMS[form].default(architecture, C, V)
        work = FORMS[form].work(architecture, tiles, C, V)
        positions = 10240 if "BLOCK_K" in work.launch.arguments else 32400
        channels = C if form in ("usage", "maxima") else C + V
        useful = 2 * 2 * 1620 * positions * channels
        assert work.operations * work.programs * work.iterations == pytest.approx(useful)
        # what its tiles multiply, which is rarely less than a program's share of that
        assert work.operations <= multiplied(form, tiles, C)


def multiplied(form, tiles, C):
    """What one iteration multiplies, useful or not."""
    channels = getattr(tiles, "block_k", C) + (tiles.block_v if form.startswith("read") else 0)
    return 2 * tiles.block_m * tiles.block_n * channels


@pytest.mark.parametrize("form", FORMS)
def test_the_main_loop_is_one_iteration(form):
    """Of each form the products in the machine code are those of its tiles: 4096 operations an instruction and warp."""
    tiles = FORMS[form].default("sm_80", 128, 512)
    table = json.loads((Path(__file__).parents[2] / "bench/results/aot.json").read_text())
    case = ("sm_80", "bfloat16", 128, 512, form)
    names = ("architecture", "dtype", "key_channels", "value_channels", "form")
    (row,) = (row for row in table if tuple(row[name] for name in names) == case)
    assert row["loop"]["HMMA"] * row["warps"] * 4096 == multiplied(form, tiles, 128)


@pytest.mark.parametrize("architecture", model.GPUS)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_predicted_is_what_is_compiled(form, architecture):
    tiles = FORMS[form].default(architecture, 128, 512)
    ours = FORMS[form].work(architecture, tiles, 128, 512).launch
    by_descriptors = getattr(tiles, "kind", "portable") == "descriptor"
    name = form.replace("read", "read, descriptors") if by_descriptors else form
    theirs = default_launches(torch.bfloat16, architecture)[name]
    assert (ours.kernel, ours.num_warps, ours.num_stages) == (theirs.kernel, theirs.num_warps, theirs.num_stages)
    # constants of the kernel are in capitals; so are sizes, of which a chunk has fewer
    constants = {name for name in ours.arguments if name.isupper() and name not in ("B", "M", "N")}
    assert "BLOCK_M" in constants
    assert {name: ours.arguments[name] for name in constants} == {name: theirs.arguments[name] for name in constants}
    given = {name for name, value in ours.arguments.items() if name.endswith("_ptr") and value is not None}
    if form != "the same, skipping":
        assert given == {
            name for name, value in theirs.arguments.items() if name.endswith("_ptr") and value is not None
        }


def test_each_program_of_a_read_has_a_part_of_the_memory():
    narrow = FORMS["read"].work("sm_80", ForwardTiles(64, 64, 128, 4, 2), 128, 512)
    assert narrow.programs == math.prod(narrow.launch.grid)
    assert narrow.programs % (4 * 26 * 2) == 0 and narrow.read_bytes == 2 * 64 * 256
    assert narrow.programs // (4 * 26 * 2) * narrow.iterations * 64 >= 32400


@pytest.mark.parametrize("form, more", [("read", 0), ("usage", 1)])
def test_a_sweep_is_written_best_first(monkeypatch, tmp_path, form, more):
    monkeypatch.setattr(model, "machine_code", lambda launch, _: (LOOP, 32 * launch.num_warps, 0, 80.0))
    monkeypatch.setattr(model, "ProcessPoolExecutor", ThreadPoolExecutor)
    model.sweep(form, ["sm_80"], tmp_path / "tiles.json", 128, 512)
    found = json.loads((tmp_path / "tiles.json").read_text())
    assert found["form"] == form
    rates = [one["apart"] for one in found["sm_80"]]
    # the default is predicted even where its stages are none of the choices'
    assert rates == sorted(rates, reverse=True)
    assert len(rates) == len(FORMS[form].choices("sm_80", 128, 512)) + more
    assert sum(one["default"] for one in found["sm_80"]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["tiles.json"]
