"""The bench of training's memory: what it finds, and that the read's share is gone."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "train_memory.py"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH.parent))  # as a script sees it
    specification = importlib.util.spec_from_file_location("train_memory", BENCH)
    module = importlib.util.module_from_spec(specification)
    sys.modules["train_memory"] = module
    specification.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCH.parent))


def measured(**case) -> dict:
    command = [sys.executable, str(BENCH), "--device", "cpu", "--case", json.dumps(case)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a process are read from Linux")
def test_the_read_of_a_long_memory_adds_a_twentieth_of_the_naive_one():
    naive, fused = (measured(what="read", version=version, frames=32)["mib"] for version in ("naive", "fused"))
    # the affinity alone, once in float32
    assert naive > 30 * 54 * 32 * 30 * 54 * 4 / 2**20
    assert fused <= naive / 20


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 7, 8, 10, 15, 100])
def test_the_search_finds_the_largest_that_fits(bench, limit):
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= 16 * limit

    assert bench.largest(fits, 16, 160) == min(16 * limit, 160)
    assert len(tried) == len(set(tried)) <= 10 and max(tried) <= 160
