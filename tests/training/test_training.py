"""Training: it learns, it resumes to the same weights, and the fused read gives the naive read's gradients."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch

from stm_model import STM, STMConfig, Tracker
from stm_model.data.clips import Clip
from stm_model.data.synthetic import ProceduralClips, procedural_clip
from stm_model.evaluation.metrics import region_similarity
from stm_model.io.images import write_image
from stm_model.io.masks import write_mask
from stm_model.network import STRIDE, soft_aggregate
from stm_model.network.weights import read_tensors
from stm_model.training.config import SmokeConfig, TrainConfig
from stm_model.training.datasets import batches, training_clips
from stm_model.training.loss import ClipLoss, clip_loss, cross_entropy, dice_loss, segment_clips
from stm_model.training.report import Report
from stm_model.training.state import TrainState, initialize
from stm_model.training.train import _Training, schedule, train


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


def tiny_shared_model() -> STM:
    torch.manual_seed(0)
    shape = {"key_channels": 16, "value_channels": 16, "decoder_channels": 16}
    model = STM(dataclasses.replace(STMConfig.shared(), **shape))
    initialize(model)
    return model


@pytest.mark.parametrize("shared", [False, True])
def test_ragged_batches_equal_the_clips_one_by_one(clips, shared):
    model = (tiny_shared_model() if shared else tiny_model()).eval()
    with torch.no_grad():
        together = clip_loss(model, clips)
        apart = torch.stack([clip_loss(model, [clip]) for clip in clips]).mean()
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)


def test_so_many_positions_are_read_in_training(clips, config):
    model = tiny_model().eval()
    for layer in (model.KV_M_r4.Key, model.KV_Q_r4.Key, model.Decoder.pred2):
        torch.nn.init.normal_(layer.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    exact, best = (clip_loss(model, clips, top_k=top_k).item() for top_k in (None, 1))
    assert best != pytest.approx(exact, rel=1e-6)
    everything = 2 * clips[0].frames[0, 0].numel() // STRIDE**2
    assert clip_loss(model, clips, top_k=everything).item() == pytest.approx(exact, rel=1e-5)
    chosen = _Training(dataclasses.replace(config, top_k=1), TrainState(config, torch.device("cpu")), None, 0, 1)
    assert chosen.loss.read_options["top_k"] == 1


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


def test_void_pixels_count_nowhere(clips):
    model = tiny_model().eval()
    clip = clips[1]
    wrong, void = clip.labels.clone(), clip.labels.clone()
    wrong[1:, :20], void[1:, :20] = 1, 255
    with torch.no_grad():
        logits = segment_clips(model, [clip])[0][0]
        losses = [clip_loss(model, [clip._replace(labels=labels)]).item() for labels in (clip.labels, wrong, void)]
    assert losses[2] != losses[0] and losses[2] != losses[1]
    known = (slice(None), slice(20, None))
    expected = torch.nn.functional.cross_entropy(logits[known][None], clip.labels[1][20:].long()[None])
    torch.testing.assert_close(cross_entropy(logits, void[1]), expected)
    torch.testing.assert_close(dice_loss(logits, void[1]), dice_loss(logits[known], clip.labels[1][20:]))
    assert cross_entropy(logits, torch.full_like(void[1], 255)) == 0


def test_void_in_the_first_frame_is_nobodys_mask(clips):
    clip = clips[0]
    labels = clip.labels.clone()
    labels[0, :5] = 255
    model = tiny_model().eval()
    with torch.no_grad():
        logits = segment_clips(model, [clip._replace(labels=labels)])[0][0]
        labels[0, :5] = 0
        expected = segment_clips(model, [clip._replace(labels=labels)])[0][0]
    assert len(logits) == 2 and torch.equal(logits, expected)


@pytest.mark.parametrize("shared", [False, True])
def test_recomputed_activations_give_the_same_gradients(clips, shared):
    gradients = []
    for recompute in (False, True):
        model = (tiny_shared_model() if shared else tiny_model()).eval()
        clip_loss(model, clips, recompute=recompute).backward()
        gradients.append(torch.cat([value.grad.flatten() for value in model.parameters()]))
    # the frames are encoded one by one, so sums are taken in another order
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm() > 0


def test_the_schedule_rises_holds_and_falls(tmp_path):
    config = TrainConfig(out=tmp_path, steps=100, warmup=10, decay=0.4)
    factors = [schedule(step, config) for step in range(1, 101)]
    assert factors[0] == 0.1 and factors[9:60] == [1.0] * 51
    assert factors[-1] == pytest.approx(1 / 40)
    assert all(a >= b for a, b in zip(factors[60:], factors[61:], strict=False))


@pytest.mark.parametrize("shape, middle", [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5), ("poly", 0.5**0.9)])
def test_the_schedule_falls_in_its_shape(tmp_path, shape, middle):
    config = TrainConfig(out=tmp_path, steps=100, warmup=0, decay=1.0, schedule=shape)
    assert schedule(1, config) == 1.0 and schedule(51, config) == pytest.approx(middle)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(out=tmp_path / "run", steps=4, batch=1, crop=32, save_every=2, log_every=1, device="cpu")


def losses_of(folder) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


SHARED = {"network": "shared", "decoder_channels": 16, "crowd": 1.0, "prior_noise": 0.5, "crop": 32}


@pytest.mark.parametrize(
    "changes",
    [{}, {"rounds": 2}, SHARED, SHARED | {"rounds": 2}, SHARED | {"prior": False, "top_k": 3}],
)
def test_a_killed_run_resumed_equals_an_unbroken_one(config, changes, tmp_path, monkeypatch):
    config = dataclasses.replace(config, **changes)
    rounds = config.rounds
    whole = train(config)
    broken = dataclasses.replace(config, out=tmp_path / "broken")

    class Killed(Exception):
        """Stands for the signal."""

    from stm_model.training import train as module

    loss = module.RoundsLoss if rounds else module.ClipLoss
    original, calls = loss.forward, []

    def die_at_the_fourth(self, clips):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return original(self, clips)

    monkeypatch.setattr(loss, "forward", die_at_the_fourth)
    with pytest.raises(Killed):
        train(broken)
    monkeypatch.setattr(loss, "forward", original)
    resumed = train(broken)
    assert losses_of(whole.parent) == losses_of(resumed.parent)
    steps = [json.loads(line)["step"] for line in (resumed.parent / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4], "each step is told once"
    one, other = read_tensors(whole), read_tensors(resumed)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert STM.load(resumed, device="cpu").config == config.network_shape


def test_a_run_is_not_continued_with_other_settings(config):
    train(dataclasses.replace(config, steps=2))
    with pytest.raises(ValueError, match="steps: the run in .* has 2, asked for 4"):
        train(config)


def test_a_run_is_continued_that_did_not_know_a_setting_yet(config):
    train(dataclasses.replace(config, steps=2))
    path = config.out / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["settings"] = {name: value for name, value in saved["settings"].items() if name not in ("color", "max_skip")}
    torch.save(saved, path)
    TrainState(dataclasses.replace(config, steps=2), torch.device("cpu"))
    with pytest.raises(ValueError, match="color: the run in .* has 0.3, asked for 0.1"):
        TrainState(dataclasses.replace(config, steps=2, color=0.1), torch.device("cpu"))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"crop": 50}, "crop: expected a multiple of 16 pixels, got 50"),
        ({"crop_width": 0}, "crop_width: expected a multiple of 16 pixels, got 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"rounds": -1}, "rounds: expected at least 0, got -1"),
        ({"frames": 1}, "frames: expected at least 2, got 1"),
        ({"procedural": 1.5}, "procedural: expected a share from 0 to 1, got 1.5"),
        ({"paste": 0.6, "replace": 0.6}, "paste, distract, replace: expected shares with a sum of at most 1"),
        ({"max_skip": (5, 2)}, r"max_skip: expected two numbers of frames, ascending from 1, got \(5, 2\)"),
        ({"weights": (1.0,)}, "weights: expected one for each of 0 data folders, got 1"),
        ({"recompute": True}, "recompute: expected freeze_batch_norm 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0, got 0.0"),
        ({"color": -0.1}, "color: expected a strength of at least 0, got -0.1"),
        ({"motion": math.nan}, "motion: expected a strength of at least 0, got nan"),
    ],
)
def test_wrong_settings_are_named(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TrainConfig(out=tmp_path, **wrong)


def test_missing_data_leaves_nothing_behind(tmp_path):
    with pytest.raises(FileNotFoundError, match="data: no such folder: .*absent"):
        train(TrainConfig(out=tmp_path / "run", data=(tmp_path / "absent",)))
    (tmp_path / "ImageSets" / "2016").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"DAVIS split train: no such file"):
        train(TrainConfig(out=tmp_path / "run", data=(tmp_path,)))
    assert not (tmp_path / "run").exists()


def test_metrics_are_logged(config):
    train(config)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert 0 < line["loss"] < 10 and line["unreadable"] == 0
        assert 0 <= line["seconds_waiting"] <= line["seconds_per_step"]


def test_the_smoke_preset_learns_one_clip_by_heart(tmp_path):
    config = SmokeConfig(out=tmp_path / "run", device="cpu")
    weights = train(config)
    two_steps = dataclasses.replace(config, steps=2)
    (clip,), (again,) = batches(two_steps, training_clips(config), 0)
    assert torch.equal(clip.frames, again.frames)
    frames = (clip.frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    results = list(Tracker(STM.load(weights, device="cpu")).track(frames, {0: clip.labels[0].numpy()}))
    for result, truth in zip(results[1:], clip.labels[1:].numpy(), strict=True):
        for label in range(1, clip.objects + 1):
            assert region_similarity(result.labels == label, truth == label) >= 0.95
    assert sorted(path.name for path in (config.out / "pictures").iterdir()) == ["000050.png", "000100.png"]


def test_parts_of_a_step_add_up_to_the_whole(config):
    whole = dataclasses.replace(config, batch=4, steps=2, freeze_batch_norm=0.0, dtype="float32")
    parts = dataclasses.replace(whole, accumulate=2, out=whole.out.with_name("parts"))
    train(whole), train(parts)
    one, other = losses_of(whole.out), losses_of(parts.out)
    assert one[1] == pytest.approx(other[1], rel=1e-6) and one[2] == pytest.approx(other[2], rel=1e-3)
    with pytest.raises(ValueError, match="batch: expected a multiple of 1 processes × 3 parts, got 4"):
        train(dataclasses.replace(whole, accumulate=3, out=whole.out.with_name("uneven")))


def test_half_precision_scales_its_gradients(config):
    for dtype in ("float16", "bfloat16"):
        run = dataclasses.replace(config, out=config.out.with_name(dtype), dtype=dtype, steps=2)
        tensors = read_tensors(train(run))
        assert all(value.isfinite().all() for value in tensors.values())
        assert all(0 < loss < 10 for loss in losses_of(run.out).values())


def test_a_run_starts_from_given_weights(config, tmp_path):
    first = train(config)
    second = dataclasses.replace(config, init=first, steps=1, learning_rate=1e-9, out=tmp_path / "second")
    one, other = read_tensors(first), read_tensors(train(second))
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one if "running" not in name)


def test_a_checkpoint_that_is_none_is_named(config):
    config.out.mkdir()
    (config.out / "checkpoint.pt").write_text("nothing")
    with pytest.raises(ValueError, match="checkpoint.pt: cannot be read as a checkpoint of a run"):
        train(config)


def test_a_loss_that_is_no_number_ends_the_run(config, monkeypatch):
    monkeypatch.setattr(ClipLoss, "forward", lambda self, clips: self.model.Decoder.pred2.weight.sum() * math.nan)
    with pytest.raises(ValueError, match="step 1: the loss is nan; a lower learning rate may help"):
        train(config)


def test_a_device_that_is_not_there_is_named(config):
    with pytest.raises(ValueError, match="device: abacus cannot be used here"):
        train(dataclasses.replace(config, device="abacus"))


def test_tensorboard_where_it_is_missing(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tensorboard: is not installed; pip install 'stm-kernels\[train\]'"):
        train(dataclasses.replace(config, tensorboard=True))


@pytest.fixture
def davis_folder(tmp_path):
    """Two sequences of five frames in the DAVIS layout; in the first a frame is broken."""
    frames, labels = procedural_clip(frames=5, size=(48, 64), objects=1, seed=2)
    root = tmp_path / "davis"
    for name in ("boat", "car"):
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / "240p" / name).mkdir(parents=True)
        for index in range(5):
            write_image(root / "JPEGImages/240p" / name / f"{index:05d}.jpg", frames[index])
            write_mask(root / "Annotations/240p" / name / f"{index:05d}.png", labels[index])
    (root / "JPEGImages/240p/boat/00002.jpg").write_bytes(b"broken")
    (root / "ImageSets" / "2016").mkdir(parents=True)
    for split, names in {"train": "boat\ncar\n", "val": "car\n"}.items():
        (root / "ImageSets/2016" / f"{split}.txt").write_text(names)
    return root


def test_training_on_a_folder_scores_itself_and_counts_what_it_cannot_read(config, davis_folder, capsys):
    train(dataclasses.replace(config, data=(davis_folder,), steps=6, batch=4))
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6 and 0 <= lines[-1]["J"] <= 1 and 0 <= lines[-1]["F"] <= 1
    assert lines[-2]["unreadable"] == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(told) == 1 and "boat/00002.jpg" in told[0], "named once"


def test_waiting_for_clips_is_told_once(config, capsys):
    training = _Training(config, TrainState(config, torch.device("cpu")), Report(config), 0, 1)
    config.out.mkdir()
    training._log(config.log_every, 0.5, seconds=1.0, waiting=0.5)
    training._log(2 * config.log_every, 0.5, seconds=1.0, waiting=0.5)
    training._log(config.log_every, 0.5, seconds=1.0, waiting=0.1)
    assert capsys.readouterr().err.count("0.50 s of each 1.00 s step are spent waiting for clips") == 1


def test_training_needs_neither_the_video_library_nor_the_command_line():
    code = (
        "import sys; import stm_model.training.train, stm_model.data.folders; "
        "print(sorted({'av', 'tyro', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_clip_may_be_wider_than_high(config):
    config = dataclasses.replace(config, crop_width=48, workers=0)
    ((clip,), *_) = batches(config, training_clips(config), 0)
    assert clip.frames.shape == (config.frames, 3, 32, 48)
    assert clip.labels.shape == (config.frames, 32, 48)
    assert train(config).is_file()
