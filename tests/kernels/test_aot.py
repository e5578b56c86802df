"""The default tiles, compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# kernels that multiply matrices, and those that do not
MULTIPLYING = {"read_kernel", "descriptor_read_kernel", "affinity_kernel", "usage_kernel", "group_max_kernel"}
OTHERS = {"merge_kernel", "group_products_kernel", "select_kernel"}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    # the interpreter compiles nothing
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "stm_kernels.gpu.aot", "--json", str(path)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return json.loads(path.read_text())


def test_every_kernel_is_there(table):
    names = ("form", "architecture", "dtype", "key_channels", "value_channels")
    cases = {tuple(row[name] for name in names) for row in table}
    assert len(cases) == len(table)
    assert {row["kernel"] for row in table} == MULTIPLYING | OTHERS
    forms, architectures, *_ = (set(column) for column in zip(*cases))
    assert architectures == {"sm_80", "sm_90", "sm_100", "gfx942"}
    fetched = {form for form in forms if "descriptor" in form or "warp" in form}
    assert len(fetched) == 3
    for architecture in architectures:
        for dtype in ("bfloat16", "float16", "float32"):
            found = {form for form, *case in cases if case == [architecture, dtype, 128, 512]}
            assert found == (forms if architecture == "sm_90" and dtype != "float32" else forms - fetched)
    for channels in ((64, 512), (64, 128), (256, 256)):
        assert sum(tuple(case[3:]) == channels for case in cases) >= 4 * len(architectures)


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
    """It shows what a change costs; renew it by `python -m stm_kernels.gpu.aot --json bench/results/aot.json`."""
    names = ("form", "kernel", "dtype", "key_channels", "value_channels", "architecture")
    recorded = json.loads((Path(__file__).parents[2] / "bench/results/aot.json").read_text())
    assert [[row[name] for name in names] for row in recorded] == [[row[name] for name in names] for row in table]


def test_the_interpreter_is_named_as_the_obstacle():
    command = [sys.executable, "-m", "stm_kernels.gpu.aot", "--architecture", "sm_90"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    failed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "TRITON_INTERPRET is set: the interpreter compiles nothing, unset it" in failed.stderr
