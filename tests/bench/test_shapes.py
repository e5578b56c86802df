"""bench/shapes.py: trackers of several weights side by side."""

import json

import pytest
import torch

import bench.shapes as shapes
from stm_model import STM, STMConfig
from stm_model.network.weights import write_tensors
from stm_model.training.state import initialize


def test_networks_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes, "SIZE", (48, 64))
    torch.manual_seed(0)
    model = STM(STMConfig.small())
    initialize(model)
    write_tensors(model.state_dict(), tmp_path / "small.safetensors")
    names = [f"{tmp_path}/small.safetensors", f"{tmp_path}/small.safetensors:32"]
    small, out = ["--objects", "1", "2", "--frames", "2", "--repeats", "1"], tmp_path / "shapes.json"
    assert shapes.main([*names, *small, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["objects"], row["memory_frames"], [*row["seconds"]]) for row in rows] == [(1, 2, names), (2, 2, names)]
    assert all(row["seconds"][name]["median"] > 0 for row in rows for name in names)
    assert "of the first" in capsys.readouterr().out


def test_weights_that_there_are_not_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        shapes.main([str(tmp_path / "none.safetensors:240")])
    assert "no such file" in capsys.readouterr().err.splitlines()[-1]
