"""The default tiles, compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    # the interpreter compiles nothing
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "stm_kernels.gpu.aot", "--json", str(path)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return json.loads(path.read_text())


def test_every_kernel_is_there(table):
    cases = {(row["form"], row["kernel"], row["dtype"], row["architecture"]) for row in table}
    forms, kernels, dtypes, architectures = (set(column) for column in zip(*cases))
    assert kernels == {"read_kernel", "affinity_kernel", "merge_kernel", "usage_kernel"}
    assert dtypes == {"bfloat16", "float16", "float32"}
    assert architectures == {"sm_80", "sm_90", "sm_100"}
    assert len(cases) == len(table) == len(forms) * 9


def test_no_default_tile_spills(table):
    assert [row for row in table if row["spills"] or row["stack_bytes"]] == []


def test_shared_memory_fits(table):
    assert [row for row in table if row["shared_kib"] > row["shared_limit_kib"]] == []


def test_half_precision_runs_on_tensor_cores(table):
    for row in table:
        if row["kernel"] == "merge_kernel":
            # it multiplies no matrices
            continue
        assert (row["tensor_cores"] > 0) == (row["dtype"] != "float32"), row


def test_the_interpreter_is_named_as_the_obstacle():
    command = [sys.executable, "-m", "stm_kernels.gpu.aot", "--architecture", "sm_90"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    failed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "TRITON_INTERPRET is set: the interpreter compiles nothing, unset it" in failed.stderr
