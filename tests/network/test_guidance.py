"""The network guided by scribbles: its names, shapes and way to remember, and how it starts from a tracker's."""

import re

import pytest
import torch

from stm_model import STM, STMConfig, Tracker
from stm_model.network import fold_batch_norm, scribble_tensors
from stm_model.network.weights import CheckpointError, write_tensors

SHAPE = STMConfig("resnet18", key_channels=16, value_channels=32, decoder_channels=16, guidance="scribbles")


@pytest.fixture(scope="module")
def model() -> STM:
    torch.manual_seed(0)
    model = STM(SHAPE).eval().requires_grad_(False)
    # statistics unlike those of a fresh network, for the folding to have something to do
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module")
def remembered() -> tuple[torch.Tensor, ...]:
    """Two frames with two objects and one: frames, masks, positive and negative scribbles."""
    random = torch.Generator().manual_seed(1)
    frames, masks = torch.rand(2, 3, 32, 48, generator=random), torch.rand(3, 32, 48, generator=random)
    scribbles = (torch.rand(2, 3, 32, 48, generator=random) < 0.05).float()
    return frames, masks, *scribbles


def test_it_differs_from_the_tracking_network_by_its_scribble_convolutions_alone():
    tracking, guided = (
        {name: value.shape for name, value in STM(STMConfig.small(guidance)).state_dict().items()}
        for guidance in ("masks", "scribbles")
    )
    assert tracking.keys() - guided.keys() == {"Encoder_M.conv1_o.weight"}
    assert guided.keys() - tracking.keys() == {"Encoder_M.conv1_p.weight", "Encoder_M.conv1_n.weight"}
    assert guided["Encoder_M.conv1_p.weight"] == guided["Encoder_M.conv1_n.weight"] == (64, 1, 7, 7)
    assert all(guided[name] == tracking[name] for name in guided.keys() & tracking.keys())


def test_the_memory_encoder_is_the_sum_of_four_convolutions(model, remembered):
    frames, masks, positive, negative = remembered
    encoder, maps = model.Encoder_M, []
    hook = encoder.bn1.register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0].double()))
    model.memorize_scribbles(*remembered, [2, 1])
    hook.remove()
    normalized = (frames - encoder.mean) / encoder.std
    truth = sum(
        torch.nn.functional.conv2d(x.double(), layer.weight.double(), stride=2, padding=3)
        for x, layer in (
            (normalized[[0, 0, 1]], encoder.conv1),
            (masks[:, None], encoder.conv1_m),
            (positive[:, None], encoder.conv1_p),
            (negative[:, None], encoder.conv1_n),
        )
    )
    torch.testing.assert_close(maps[0], truth, atol=1e-5, rtol=0)


def test_batch_norm_folds(model, remembered):
    folded = fold_batch_norm(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    for ours, truth in zip(
        folded.memorize_scribbles(*remembered, [2, 1]), model.double().memorize_scribbles(*remembered, [2, 1])
    ):
        torch.testing.assert_close(ours.double(), truth, atol=1e-4, rtol=0)
    model.float()


def test_what_is_written_is_read_and_recognised(model, tmp_path):
    path = tmp_path / "weights.safetensors"
    write_tensors(model.state_dict(), path)
    loaded = STM.load(path, device="cpu", dtype=torch.float32)
    assert loaded.config == model.config == SHAPE
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_half_of_the_scribble_convolutions_is_no_network(model, tmp_path):
    path = tmp_path / "weights.safetensors"
    write_tensors({k: v for k, v in model.state_dict().items() if k != "Encoder_M.conv1_n.weight"}, path)
    with pytest.raises(CheckpointError, match=r"does not hold an STM: missing Encoder_M\.conv1_n\.weight$"):
        STM.load(path)


def test_the_wrong_guidance_is_named(model, small_model, remembered):
    frames, masks, positive, negative = remembered
    asked_for_masks = re.escape("model: expected a network guided by masks, got one guided by scribbles")
    with pytest.raises(ValueError, match=asked_for_masks):
        model.memorize(frames, masks, positive, [2, 1])
    with pytest.raises(ValueError, match=asked_for_masks):
        Tracker(model)
    with pytest.raises(ValueError, match="expected a network guided by scribbles, got one guided by masks"):
        small_model.memorize_scribbles(*remembered, [2, 1])
    with pytest.raises(ValueError, match="guidance: expected one of masks, scribbles, got 'words'"):
        STMConfig(guidance="words")


def test_it_starts_as_the_tracking_network_with_scribbles_for_masks(small_model, remembered):
    frames, masks, scribbles, negative = remembered
    tensors = scribble_tensors(small_model.state_dict())
    assert STMConfig.of_tensors(tensors) == SHAPE
    started = STM(SHAPE).eval().requires_grad_(False)
    started.load_state_dict(tensors)
    nothing = torch.zeros_like(masks)
    for ours, truth in (
        (started.memorize_scribbles(frames, masks, nothing, negative, [2, 1]), (masks, negative)),
        (started.memorize_scribbles(frames, nothing, scribbles, nothing, [2, 1]), (scribbles, nothing)),
    ):
        for one, other in zip(ours, small_model.memorize(frames, *truth, [2, 1])):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    # copies: training them leaves the tracker as it was
    tensors["Encoder_M.conv1_m.weight"].add_(1)
    assert not torch.equal(tensors["Encoder_M.conv1_m.weight"], small_model.Encoder_M.conv1_m.weight)
