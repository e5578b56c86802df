"""One step of training, seen in the checkpoint it leaves: Adam's moments tell the gradient it was given."""

import dataclasses
import functools

import pytest
import torch

from stm_model.data.clips import Clip
from stm_model.data.synthetic import ProceduralClips
from stm_model.network import STM, STMConfig
from stm_model.training.config import TrainConfig
from stm_model.training.loss import segment_clips
from stm_model.training.rounds import segment_rounds
from stm_model.training.state import TrainState, initialize
from stm_model.training.train import schedule, train

BETA = 0.9
"""Adam's default: after one step its first moment is 1 − BETA of the gradient."""
SCALE = 256.0
"""Of the gradients in float16."""
TRUNK = ("conv1.", "bn1.", "res2.", "res3.", "res4.")


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(
        tmp_path / "run", steps=1, batch=1, crop=32, device="cpu", dtype="float32", freeze_batch_norm=0.0, warmup=0
    )


def checkpoint_of(config: TrainConfig) -> dict:
    """What a run leaves, once it is done."""
    train(config)
    return torch.load(config.out / "checkpoint.pt", weights_only=True)


def gradient_of(config: TrainConfig) -> torch.Tensor:
    """The gradient that Adam was given in a run of one step."""
    moments = checkpoint_of(config)["optimizer"]["state"].values()
    assert moments, "a step was made"
    return torch.cat([moment["exp_avg"].flatten() for moment in moments]) / (1 - BETA)


def test_the_gradient_is_clipped_to_its_norm(config):
    free = gradient_of(dataclasses.replace(config, clip_gradient=1e9))
    most = free.norm().item() / 4
    clipped = gradient_of(dataclasses.replace(config, clip_gradient=most, out=config.out.with_name("clipped")))
    assert clipped.norm().item() == pytest.approx(most, rel=1e-4)
    torch.testing.assert_close(clipped, free / 4, rtol=1e-3, atol=1e-3 * most / len(free) ** 0.5)


def test_the_gradient_is_unscaled_before_it_is_clipped(config, monkeypatch):
    # low enough for float16 to hold the gradients: the first step is made
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=SCALE))
    config = dataclasses.replace(config, dtype="float16")
    free = gradient_of(dataclasses.replace(config, clip_gradient=1e9))
    most = free.norm().item() / 4
    clipped = gradient_of(dataclasses.replace(config, clip_gradient=most, out=config.out.with_name("clipped")))
    # clipped first and unscaled afterwards, its norm would be 1 / SCALE of that
    assert clipped.norm().item() == pytest.approx(most, rel=1e-4)
    wide = gradient_of(
        dataclasses.replace(config, dtype="float32", clip_gradient=1e9, out=config.out.with_name("wide"))
    )
    # float16 rounds the gradient, but not by a factor of SCALE
    assert 0.5 < free.norm() / wide.norm() < 2


def test_the_trunk_moves_at_its_rate(config):
    config = dataclasses.replace(config, trunk_rate=0.25, learning_rate=1e-3)
    start = {name: value.clone() for name, value in TrainState(config, torch.device("cpu")).model.named_parameters()}
    end = checkpoint_of(config)["model"]
    moved: dict[bool, list[float]] = {True: [], False: []}
    for name, value in start.items():
        encoder, _, part = name.partition(".")
        moved[encoder.startswith("Encoder_") and part.startswith(TRUNK)].append((end[name] - value).abs().max().item())
    # Adam's first step is the learning rate wherever a gradient is well above its epsilon
    rate = config.learning_rate * schedule(1, config)
    assert max(moved[False]) == pytest.approx(rate, rel=1e-3)
    assert max(moved[True]) == pytest.approx(0.25 * rate, rel=1e-3)


def test_the_average_moves_by_one_minus_the_decay(config):
    start = TrainState(config, torch.device("cpu")).average
    saved = checkpoint_of(dataclasses.replace(config, ema=0.25, learning_rate=1e-2, freeze_batch_norm=1.0))
    # min(ema, (1 + step) / (10 + step)) of the start stays
    kept = 2 / 11
    for name in ("Encoder_Q.conv1.weight", "Encoder_Q.bn1.running_mean", "Decoder.pred2.weight"):
        expected = kept * start[name] + (1 - kept) * saved["model"][name]
        torch.testing.assert_close(saved["average"][name], expected)
        assert not saved["model"][name].equal(start[name])


def remembered_masks(guidance: str, monkeypatch) -> list[torch.Tensor]:
    """The masks that are remembered while a clip is segmented."""
    torch.manual_seed(0)
    model = STM(STMConfig("resnet18", 16, 16, 16, guidance=guidance))
    initialize(model)
    clip: Clip = ProceduralClips(size=(32, 32), objects=(1, 1))[0]
    name = "memorize" if guidance == "masks" else "memorize_scribbles"
    memorize, found = getattr(model, name), []
    monkeypatch.setattr(model, name, lambda frames, masks, *more: found.append(masks) or memorize(frames, masks, *more))
    if guidance == "masks":
        segment_clips(model, [clip])
    else:
        segment_rounds(model, [clip], 3)
    return found


@pytest.mark.parametrize("guidance", ["masks", "scribbles"])
def test_no_gradient_flows_through_a_mask_that_is_fed_back(guidance, monkeypatch):
    masks = remembered_masks(guidance, monkeypatch)
    assert len(masks) >= 2 and not masks[1].equal(masks[0]), "a predicted mask is among them"
    assert not any(mask.requires_grad for mask in masks)
