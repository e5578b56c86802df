"""The study of what helps training: what it runs, what it takes from runs that are done, and its table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.training_study import BASE, VARIANTS, folder

ROOT = Path(__file__).parents[2]


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.training_study", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def done(run: Path, J: float, steps: int = 500) -> None:
    """A run as training leaves it."""
    run.mkdir(parents=True)
    losses = [{"step": step, "loss": step / steps, "seconds_per_step": 0.5} for step in range(50, steps + 1, 50)]
    lines = [*losses, {"step": steps, "J": J, "F": J - 0.1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def files(tmp_path) -> list:
    (tmp_path / "data").mkdir()
    (tmp_path / "trunk.pth").write_bytes(b"no trunk")
    return ["--data", tmp_path / "data", "--trunk", tmp_path / "trunk.pth", "--out", tmp_path / "out"]


def test_runs_that_are_done_are_compared_seed_by_seed(files, tmp_path):
    scores = {"reference": (0.7, 0.8), "distance": (0.74, 0.82)}
    for name, pair in scores.items():
        for seed, J in enumerate(pair):
            done(folder(tmp_path / "out", name, seed), J)
    finished = run(*files, "--only", "distance", "--results", tmp_path / "study.json")
    assert finished.returncode == 0, finished.stderr
    assert "| reference | 0.700 | 0.800 |  |  | 0.950 | 0.50 |" in finished.stdout
    assert "| distance | 0.740 | 0.820 | +0.030 | +0.030 | 0.950 | 0.50 |" in finished.stdout
    found = json.loads((tmp_path / "study.json").read_text())["results"]
    assert found["distance"]["1"]["J"] == 0.82


def test_a_run_that_fails_is_named_with_its_log(files, tmp_path):
    done(folder(tmp_path / "out", "reference", 0), 0.7)
    # the next one is not at its end, and there is nothing to train on
    done(folder(tmp_path / "out", "square views", 0), 0.7, steps=400)
    finished = run(*files, "--only", "square views", "--seeds", "0", "--results", tmp_path / "study.json")
    log = tmp_path / "out" / "square-views-0.log"
    assert finished.returncode == 1 and f"square views, seed 0: did not end; see {log}" in finished.stderr
    assert "stm: error: " in log.read_text() and not (tmp_path / "study.json").exists()


def test_every_variant_differs_from_the_base_in_settings_that_it_has():
    assert VARIANTS["reference"] == {}
    for name, changes in VARIANTS.items():
        assert name == "reference" or changes and changes.keys() <= BASE.keys()
        assert all(BASE[option] != value for option, value in changes.items())


def test_a_missing_file_is_one_line(files, tmp_path):
    (tmp_path / "trunk.pth").unlink()
    finished = run(*files)
    assert finished.returncode == 2 and finished.stderr.endswith("trunk.pth: no such file or folder\n")
