"""Training by several processes: torchrun's on the CPU, over gloo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stm_model.network.weights import read_tensors
from stm_model.runtime import DEFAULT_WEIGHTS

ROOT = Path(__file__).parents[2]
SETTINGS = ["--steps", "5", "--batch", "4", "--crop", "32", "--dtype", "float32"]
SETTINGS += ["--freeze-batch-norm", "0", "--learning-rate", "5e-6", "--warmup", "0", "--decay", "0", "--log-every", "1"]
SETTINGS += ["--workers", "0", "--device", "cpu"]


def run(out: Path, processes: int, *settings: str) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "stm_model", "train", "--out", str(out)]
    return subprocess.run([*command, *SETTINGS, *settings], cwd=ROOT, capture_output=True, text=True)


def test_two_processes_give_the_weights_of_one(tmp_path):
    """Each of two takes half of a step's clips, in two parts: one process has twice the batch of each.

    Adam takes a gradient that is rounding alone for real, so single weights may part; all but one in 10⁴ agree.
    """
    for processes in (1, 2):
        finished = run(
            tmp_path / str(processes), processes, "--accumulate", str(processes), "--init", str(DEFAULT_WEIGHTS)
        )
        assert finished.returncode == 0, finished.stderr
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in "12")
    start = read_tensors(DEFAULT_WEIGHTS)
    flat = [torch.cat([tensors[name].flatten().float() for name in one]) for tensors in (start, one, two)]
    apart, moved = (flat[1] - flat[2]).abs(), (flat[1] - flat[0]).abs()
    assert moved.max() > 2e-5, "five steps lead farther than the tolerance"
    assert (apart > 1e-5).float().mean() < 1e-4
    assert apart.norm() < 0.01 * moved.norm()
    logs = [list(map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())) for name in "12"]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5], "one process alone writes"
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], rel=1e-5)
