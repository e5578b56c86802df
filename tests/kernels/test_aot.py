"""The default tiles, compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

import stm_kernels.gpu.aot as aot
from stm_kernels.gpu.aot import differences
from stm_kernels.gpu.launch import target_of
from stm_kernels.gpu.machine_code import main_loop

# kernels that multiply matrices, and those that do not
MULTIPLYING = {"read_kernel", "descriptor_read_kernel", "affinity_kernel", "usage_kernel", "group_max_kernel"}
OTHERS = {"merge_kernel", "group_products_kernel", "select_kernel"}
NAMES = ("form", "dtype", "key_channels", "value_channels", "architecture")
RECORDED = Path(__file__).parents[2] / "bench/results/aot.json"


def check(recorded: Path, out: Path, *more: str) -> list[dict]:
    # the interpreter compiles nothing
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "stm_kernels.gpu.aot", "--check", str(recorded), "--json", str(out), *more]
    checked = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert checked.returncode in (0, 1), checked.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return check(RECORDED, tmp_path_factory.mktemp("aot") / "aot.json")


def test_every_kernel_is_there(table):
    names = ("form", "architecture", "dtype", "key_channels", "value_channels")
    cases = {tuple(row[name] for name in names) for row in table}
    assert len(cases) == len(table)
    assert {row["kernel"] for row in table} == MULTIPLYING | OTHERS
    forms, architectures, *_ = (set(column) for column in zip(*cases))
    assert architectures == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"}
    fetched = {form for form in forms if "descriptor" in form or "warp" in form}
    assert len(fetched) == 4
    dropping = {form for form in forms if form.startswith("read") and "skipping" in form}
    for architecture in architectures:
        for dtype in ("bfloat16", "float32"):
            found = {form for form, *case in cases if case == [architecture, dtype, 128, 512]}
            missing = set() if architecture == "sm_90" and dtype != "float32" else fetched
            # no tiles are known that do not spill
            missing = missing | (dropping if (architecture, dtype) == ("gfx1100", "float32") else set())
            assert found == forms - missing
        halves = {form for form, *case in cases if case[:2] == [architecture, "float16"]}
        assert halves == {"read", "affinity and gradient", "chosen"}
    for channels in ((64, 512), (64, 128), (256, 256)):
        assert sum(tuple(case[3:]) == channels for case in cases) >= 4 * len(architectures)


def test_a_warp_has_64_threads_on_cdna_alone():
    sizes = {name: target_of(name).warp_size for name in aot.ARCHITECTURES}
    assert {name for name, size in sizes.items() if size == 64} == {"gfx942"}
    assert set(sizes.values()) == {32, 64}


def test_no_default_tile_spills(table):
    assert [row for row in table if row["spills"] or row["stack_bytes"]] == []


def test_shared_memory_fits(table):
    assert [row for row in table if row["shared_kib"] > row["shared_limit_kib"]] == []


def test_half_precision_runs_on_tensor_cores(table):
    for row in table:
        # AMD's matrix cores take float32 too
        if row["kernel"] in MULTIPLYING and (row["dtype"] != "float32" or row["architecture"] != "gfx942"):
            assert (row["tensor_cores"] > 0) == (row["dtype"] != "float32"), row


def test_the_table_in_the_repository_is_this_one(table):
    """It shows what a change costs; renew it by `--check bench/results/aot.json --json bench/results/aot.json`."""
    assert differences(json.loads(RECORDED.read_text()), table) == []


def test_kernels_whose_source_is_not_the_recorded_one_are_compiled(tmp_path):
    rows = [row for row in json.loads(RECORDED.read_text()) if row["architecture"] == "sm_80"]
    (merge,) = (row for row in rows if (row["form"], row["dtype"]) == ("merge", "bfloat16"))
    (usage,) = (row for row in rows if row["form"] == "usage" and row["dtype"] == "float32")
    changed, recorded = [merge, usage], tmp_path / "recorded.json"
    wrong = [row | {"registers": 1, "source": "of another version"} if row in changed else row for row in rows]
    recorded.write_text(json.dumps(wrong))
    assert differences(rows, check(recorded, tmp_path / "found.json", "--architecture", "sm_80")) == []


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
@pytest.mark.parametrize("form", ["read, l2", "usage"])
def test_compiling_gives_what_the_table_has(architecture, form, tmp_path):
    case = (form, "bfloat16", 64, 128, architecture)
    (row,) = (row for row in json.loads(RECORDED.read_text()) if tuple(row[name] for name in NAMES) == case)
    code = f"import json, stm_kernels.gpu.aot as aot; print(json.dumps(aot.as_row(aot._compile({case}))))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    # where a kernel has only moved in its file, its source differs, and nothing else
    assert differences([row], [json.loads(found.stdout)]) == []


def test_what_differs_is_named():
    names = ("architecture", "dtype", "key_channels", "value_channels", "form")
    rows = [dict(zip(names, ("sm_90", "bfloat16", 128, 512, form)), registers=200, loop={"HGMMA": 8}) for form in "abc"]
    assert differences(rows, rows) == []
    changed = [rows[0] | {"registers": 255}, rows[1] | {"loop": {"HGMMA": 8, "STL": 2}}, rows[2] | {"form": "d"}]
    assert differences(rows, changed) == [
        "sm_90 bfloat16 128 512 a: registers 200 → 255",
        "sm_90 bfloat16 128 512 b: loop {'HGMMA': 8} → {'HGMMA': 8, 'STL': 2}",
        "sm_90 bfloat16 128 512 c: only in the recorded table",
        "sm_90 bfloat16 128 512 d: not in the recorded table",
    ]


def test_a_kernel_is_disassembled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    seen = []

    def run(command, **_):
        seen.append(command[:-1])
        return SimpleNamespace(stdout=f"{Path(command[0]).name} of {Path(command[-1]).read_text()}")

    monkeypatch.setattr(aot.subprocess, "run", run)
    first, second = (SimpleNamespace(hash=32 * code, asm={"cubin": code.encode()}) for code in ("ab", "cd"))
    for _ in range(2):
        assert aot._disassemble(first, "nvdisasm", "-c") == "nvdisasm of ab"
    assert aot._disassemble(second, "nvdisasm", "-c") == "nvdisasm of cd"
    assert aot._disassemble(first, "cuobjdump") == "cuobjdump of ab"
    assert len(seen) == 3


SASS = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
.L_x_3:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_3) ;
"""


def test_the_main_loop_is_the_innermost_one_that_multiplies():
    assert [line.split()[0] for line in main_loop(SASS)] == ["HMMA.16816.F32.BF16"] * 2 + ["BRA"]
    whole = main_loop(SASS.replace("HMMA.16816.F32.BF16", "FFMA"))
    assert len(whole) == 10


def test_the_interpreter_is_named_as_the_obstacle():
    command = [sys.executable, "-m", "stm_kernels.gpu.aot", "--architecture", "sm_90"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    failed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "TRITON_INTERPRET is set: the interpreter compiles nothing, unset it" in failed.stderr


@pytest.mark.parametrize(
    "text, said",
    [(None, "No such file or directory"), ("[1]", "expected a table that --json wrote, got")],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys, text, said):
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["aot", "--check", str(path)])
    with pytest.raises(SystemExit) as ended:
        aot.main()
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert str(path) in line and said in line
