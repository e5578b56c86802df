"""Checkpoints: released and own, with and without `module.`, and files that are none."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stm_model import STM, STMConfig
from stm_model.network import fold_batch_norm
from stm_model.network.weights import CheckpointError, read_tensors, write_tensors
from stm_model.runtime import DEFAULT_INTERACTIVE_WEIGHTS, chosen_side


@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_files_load_strictly(tmp_path, parity_tensors, prefix):
    path = tmp_path / "STM_weights.pth"
    torch.save({prefix + name: value for name, value in parity_tensors.items()}, path)
    model = STM.load(path, device="cpu", dtype=torch.float32)
    assert model.config == STMConfig() and not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, parity_tensors[name]), name


def test_what_is_written_is_read(tmp_path, small_model):
    path = tmp_path / "weights.safetensors"
    write_tensors(small_model.state_dict(), path)
    loaded = STM.load(path, device="cpu", dtype=torch.float32)
    assert loaded.config == small_model.config
    for name, value in small_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    write_tensors(small_model.state_dict(), path, torch.float16)
    assert read_tensors(path)["Decoder.pred2.bias"].dtype == torch.float16
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]


def test_the_first_five_tensors_that_differ_are_named(tmp_path, small_model):
    tensors = dict(small_model.state_dict())
    del tensors["Decoder.pred2.bias"]
    tensors["Decoder.pred2.weight"] = torch.zeros(3, 16, 3, 3)
    tensors |= {f"extra{index}": torch.zeros(1) for index in range(6)}
    path = tmp_path / "weights.safetensors"
    write_tensors(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        STM.load(path)
    message = str(caught.value)
    assert str(path) in message and "missing Decoder.pred2.bias" in message
    assert message.count("unexpected extra") == 4 and message.endswith("; and 3 more")


def test_a_shape_that_differs_is_named(tmp_path, small_model):
    path = tmp_path / "weights.safetensors"
    write_tensors(small_model.state_dict() | {"Decoder.pred2.weight": torch.zeros(3, 16, 3, 3)}, path)
    with pytest.raises(CheckpointError, match=r"Decoder\.pred2\.weight \[3, 16, 3, 3\] instead of \[2, 16, 3, 3\]"):
        STM.load(path)


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: .*missing.pth"):
        STM.load(tmp_path / "missing.pth")
    for name in ("broken.pth", "broken.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"not a checkpoint at all")
        with pytest.raises(CheckpointError, match=name):
            STM.load(tmp_path / name)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(CheckpointError, match="empty.pth can't be read"):
        STM.load(tmp_path / "empty.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="expected a dictionary of named tensors"):
        STM.load(tmp_path / "list.pth")


@pytest.mark.parametrize(
    "path, config", [(None, STMConfig.shared()), (DEFAULT_INTERACTIVE_WEIGHTS, STMConfig.shared("scribbles"))]
)
def test_the_default_weights_are_small_and_load(path, config):
    model = STM.load(path, device="cpu", dtype=torch.float32)
    assert model.config == config
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize(
    "size, weights, frame_size, share, side",
    [
        (None, None, (240, 432), None, 480),
        (None, None, (1920, 1080), 0.02, 480),
        (None, None, (480, 854), 0.011, None),
        (None, None, (480, 854), 0.009, 600),
        (None, None, (600, 800), 0.009, None),
        (None, DEFAULT_INTERACTIVE_WEIGHTS, (240, 432), None, 480),
        (None, Path("STM_weights.pth"), (1080, 1920), 0.009, None),
        (360, None, (1080, 1920), 0.009, 360),
    ],
)
def test_the_side_at_which_a_network_runs(size, weights, frame_size, share, side):
    masks = None
    if share is not None:
        first = np.zeros(frame_size, np.uint8)
        first[:, : frame_size[1] // 2] = 1
        first.reshape(-1)[-round(share * first.size) :] = 7
        first[0, 0] = 255
        # the first mask alone says it
        masks = {5: np.zeros_like(first), 2: first}
    assert chosen_side(size, weights, frame_size, masks) == side


def test_masks_without_an_object_are_of_no_small_one():
    assert chosen_side(None, None, (240, 432), {0: np.full((240, 432), 255, np.uint8)}) == 480


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [STMConfig.lite(), STMConfig.small()], ids=["lite", "resnet"])
def test_in_half_precision_folded_weights_are_rounded_once(tmp_path, config, dtype):
    torch.manual_seed(0)
    model = STM(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2.0)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_()
    write_tensors(model.state_dict(), tmp_path / "weights.safetensors")
    expected = fold_batch_norm(STM.load(tmp_path / "weights.safetensors", "cpu", torch.float32)).to(dtype).state_dict()
    found = fold_batch_norm(STM.load(tmp_path / "weights.safetensors", "cpu", dtype)).state_dict()
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)
    # and what is written in half precision is read as the same in float32
    write_tensors(STM.load(tmp_path / "weights.safetensors", "cpu", dtype).state_dict(), tmp_path / "half.safetensors")
    for name, tensor in (
        fold_batch_norm(STM.load(tmp_path / "half.safetensors", "cpu", torch.float32)).state_dict().items()
    ):
        torch.testing.assert_close(tensor, expected[name].to(tensor.dtype), rtol=1e-6, atol=0)
