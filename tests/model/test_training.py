"""Training: it learns, it resumes to the same weights, and the fused read gives the naive read's gradients."""

import dataclasses
import json

import pytest
import torch

from stm_model import STM, STMConfig
from stm_model.checkpoint import read_tensors
from stm_model.data.clips import Clip
from stm_model.data.synthetic import ProceduralClips
from stm_model.network import soft_aggregate
from stm_model.training.loss import clip_loss, dice_loss, segment_clips
from stm_model.training.train import TrainConfig, initialize, schedule, train


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """Three clips with one, two and three objects."""
    clips = (ProceduralClips(size=(64, 64), objects=(count, count)) for count in (1, 2, 3))
    return [
        next(clip for seed in range(100) if (clip := dataset[seed]).objects == count)
        for count, dataset in enumerate(clips, 1)
    ]


def tiny_model(seed: int = 0) -> STM:
    torch.manual_seed(seed)
    model = STM(STMConfig(backbone="resnet18", key_channels=16, value_channels=16, decoder_channels=16))
    initialize(model)
    return model


def test_it_overfits_one_clip(clips):
    model, clip = tiny_model().train(), clips[0]
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    first = None
    for _ in range(50):
        loss = clip_loss(model, [clip])
        first = first if first is not None else loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.25 * first
    with torch.no_grad():
        logits = segment_clips(model, [clip])[-1][0]
    ours, truth = logits.argmax(0) == 1, clip.labels[-1] == 1
    assert (ours & truth).sum() / (ours | truth).sum() > 0.8


def test_ragged_batches_equal_the_clips_one_by_one(clips):
    model = tiny_model().eval()
    with torch.no_grad():
        together = clip_loss(model, clips)
        apart = torch.stack([clip_loss(model, [clip]) for clip in clips]).mean()
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)


def test_gradients_of_the_fused_read_equal_those_of_the_naive_one(clips):
    gradients = {}
    for implementation in ("chunked", "reference"):
        model = tiny_model().eval()
        # a fresh network attends evenly: sharper keys make the read's gradient matter
        for layer in (model.KV_M_r4.Key, model.KV_Q_r4.Key, model.Decoder.pred2):
            torch.nn.init.normal_(layer.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        clip_loss(model, clips, implementation=implementation).backward()
        # a layer's weight and bias together: the bias of the memory keys moves all logits of a query alike, so its
        # gradient is zero but for rounding
        gradients[implementation] = {
            name: torch.cat([value.grad.flatten() for value in module.parameters()])
            for name, module in model.named_modules()
            if list(module.parameters(recurse=False))
        }
    for name, naive in gradients["reference"].items():
        fused = gradients["chunked"][name]
        assert (fused - naive).norm() <= 1e-4 * naive.norm() + 1e-9, name
    assert gradients["reference"]["KV_M_r4.Key"].norm() > 1e-6


def test_gradients_flow_through_the_memory(clips):
    model = tiny_model().train()
    clip_loss(model, clips[:1]).backward()
    for name in ("Encoder_M.conv1_m.weight", "KV_M_r4.Value.weight", "Encoder_Q.conv1.weight", "Decoder.pred2.weight"):
        assert dict(model.named_parameters())[name].grad.norm() > 0, name


def test_dice_loss_counts_small_objects_like_large_ones():
    labels = torch.zeros(20, 20, dtype=torch.uint8)
    labels[:2, :2], labels[5:, :] = 1, 2
    truth = torch.stack([(labels == label).float() for label in (1, 2)])
    perfect = soft_aggregate(truth)
    assert dice_loss(perfect, labels) < 1e-3
    small_missed, large_missed = truth.clone(), truth.clone()
    small_missed[0], large_missed[1] = 0, 0
    missed = [dice_loss(soft_aggregate(masks), labels).item() for masks in (small_missed, large_missed)]
    assert missed[0] > 0.3 and abs(missed[0] - missed[1]) < 0.15


def test_the_schedule_rises_holds_and_falls(tmp_path):
    config = TrainConfig(out=tmp_path, steps=100, warmup=10, decay=0.4)
    factors = [schedule(step, config) for step in range(1, 101)]
    assert factors[0] == 0.1 and factors[9:60] == [1.0] * 51
    assert factors[-1] == pytest.approx(1 / 40) and all(
        a >= b for a, b in zip(factors[60:], factors[61:], strict=False)
    )


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(out=tmp_path / "run", steps=4, batch=1, crop=32, save_every=2, log_every=2, device="cpu")


def test_a_killed_run_resumed_equals_an_unbroken_one(config, tmp_path, monkeypatch):
    whole = train(config)
    broken = dataclasses.replace(config, out=tmp_path / "broken")

    class Killed(Exception):
        """Stands for the signal."""

    from stm_model.training import train as module

    original, calls = module.clip_loss, []

    def die_at_the_third(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(module, "clip_loss", die_at_the_third)
    with pytest.raises(Killed):
        train(broken)
    monkeypatch.setattr(module, "clip_loss", original)
    resumed = train(broken)
    one, other = read_tensors(whole), read_tensors(resumed)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert STM.load(resumed, device="cpu").config == STMConfig.small()


def test_a_run_is_not_continued_with_other_settings(config):
    train(dataclasses.replace(config, steps=2))
    with pytest.raises(ValueError, match="steps: the run in .* has 2, asked for 4"):
        train(config)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"crop": 50}, "crop: expected a multiple of 16 pixels, got 50"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"frames": 1}, "frames: expected at least 2, got 1"),
        ({"procedural": 1.5}, "procedural: expected a share from 0 to 1, got 1.5"),
    ],
)
def test_wrong_settings_are_named(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TrainConfig(out=tmp_path, **wrong)


def test_missing_data_leaves_nothing_behind(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no fit\.txt under"):
        train(TrainConfig(out=tmp_path / "run", data=tmp_path))
    assert not (tmp_path / "run").exists()


def test_metrics_are_logged(config):
    train(config)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(0 < line["loss"] < 10 and line["seconds_per_step"] > 0 for line in lines)
