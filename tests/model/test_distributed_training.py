"""Training by several processes: torchrun's on the CPU, over gloo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stm_model.checkpoint import DEFAULT_INTERACTIVE_WEIGHTS, read_tensors, write_tensors

ROOT = Path(__file__).parents[2]
SETTINGS = ["--steps", "5", "--batch", "4", "--crop", "32", "--dtype", "float32"]
SETTINGS += ["--freeze-batch-norm", "0", "--learning-rate", "5e-6", "--warmup", "0", "--decay", "0", "--log-every", "1"]
SETTINGS += ["--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Trained ResNet-18 weights: in a fresh network, or behind ReLU6, some gradients are rounding alone.

    Adam takes those for real.
    """
    tensors = read_tensors(DEFAULT_INTERACTIVE_WEIGHTS)
    tensors["Encoder_M.conv1_m.weight"] = tensors.pop("Encoder_M.conv1_p.weight")
    tensors["Encoder_M.conv1_o.weight"] = tensors.pop("Encoder_M.conv1_n.weight")
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    write_tensors(tensors, path)
    return path


def run(out: Path, processes: int, *settings: str) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "stm_model.cli", "train", "--out", str(out)]
    return subprocess.run([*command, *SETTINGS, *settings], cwd=ROOT, capture_output=True, text=True)


def test_two_processes_give_the_weights_of_one(weights, tmp_path):
    """Each of two takes half of a step's clips, in two parts: one process has twice the batch of each."""
    for processes in (1, 2):
        finished = run(tmp_path / str(processes), processes, "--accumulate", str(processes), "--init", str(weights))
        assert finished.returncode == 0, finished.stderr
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in "12")
    start = read_tensors(weights)
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert max((one[name] - start[name]).abs().max() for name in one) > 2e-5, (
        "five steps lead farther than the tolerance"
    )
    logs = [list(map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())) for name in "12"]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5], "one process alone writes"
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], rel=1e-5)
