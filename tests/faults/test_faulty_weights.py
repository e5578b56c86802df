"""Weights that are not finite are refused at load, by name."""

import pytest
import torch
from table import Fault, each, judge

from stm_model import STM
from stm_model.commands.main import main
from stm_model.network.weights import CheckpointError, read_tensors, write_tensors


def spoiled(weights, path, values):
    """The weights with the first number of some tensors replaced."""
    tensors = read_tensors(weights)
    for name, value in values.items():
        tensors[name].flatten()[0] = value
    write_tensors(tensors, path)
    return path


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_bad_tensors_are_named(weights, tmp_path, value):
    names = [name for name, tensor in STM.load(weights).state_dict().items() if tensor.is_floating_point()]
    one = spoiled(weights, tmp_path / "one.safetensors", {names[3]: value})
    with pytest.raises(CheckpointError, match=f"one.safetensors has NaN or infinity, in float32, in {names[3]}$"):
        STM.load(one, device="cpu", dtype="float32")
    many = spoiled(weights, tmp_path / "many.safetensors", dict.fromkeys(names[:7], value))
    with pytest.raises(CheckpointError, match=f"in {', '.join(names[:5])} and 2 more$"):
        STM.load(many, device="cpu", dtype="bfloat16")


def test_what_a_smaller_dtype_does_not_hold_is_refused_in_it_alone(weights, tmp_path):
    path = spoiled(weights, tmp_path / "large.safetensors", {"Decoder.pred2.bias": 1e6})
    STM.load(path, device="cpu", dtype="float32")
    with pytest.raises(CheckpointError, match="in float16, in Decoder.pred2.bias"):
        STM.load(path, device="cpu", dtype="float16")


@each([Fault("weights with NaN", lambda clip, made: {}, "has NaN or infinity, in float32, in Decoder.pred2.bias")])
def test_the_line_and_what_is_kept(fault, track, clip, tmp_path, out, weights):
    bad = spoiled(weights, tmp_path / "bad.safetensors", {"Decoder.pred2.bias": torch.nan})
    judge(fault._replace(arrange=lambda *_: {"checkpoint": bad}), track, clip, tmp_path / "made", out)


def test_a_training_that_cannot_start_leaves_no_folder(tmp_path, capsys):
    (tmp_path / "start.safetensors").write_bytes(b"no weights")
    arguments = ["--preset", "smoke", "--init", str(tmp_path / "start.safetensors"), "--out", str(tmp_path / "run")]
    assert main(["train", *arguments]) == 2
    assert f"{tmp_path / 'start.safetensors'} can't be read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
