"""Clips: procedural ones, folders in the DAVIS layout, augmentation."""

import numpy as np
import pytest
import torch
from PIL import Image

from stm_model.data.augment import paste_objects, random_color, random_view, visible_objects
from stm_model.data.clips import Clip
from stm_model.data.davis import DavisClips, davis_sequences
from stm_model.data.synthetic import ProceduralClips, procedural_clip
from stm_model.evaluation.metrics import region_similarity


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_procedural_clip_is_a_function_of_its_seed():
    frames, labels = procedural_clip(frames=6, size=(48, 64), objects=2, seed=5)
    assert frames.shape == (6, 48, 64, 3) and frames.dtype == np.uint8
    assert labels.shape == (6, 48, 64) and labels.dtype == np.uint8
    again = procedural_clip(frames=6, size=(48, 64), objects=2, seed=5)
    np.testing.assert_array_equal(frames, again[0])
    np.testing.assert_array_equal(labels, again[1])
    assert (procedural_clip(frames=6, size=(48, 64), objects=2, seed=6)[0] != frames).any()


def test_procedural_objects_move_smoothly_and_look_unlike_their_surroundings():
    scores, contrasts = [], []
    for seed in range(8):
        frames, labels = procedural_clip(frames=8, size=(96, 128), objects=1, seed=seed)
        if not (labels == 1).any(axis=(1, 2)).all():
            continue
        scores += [region_similarity(one == 1, other == 1) for one, other in zip(labels, labels[1:], strict=False)]
        inside, outside = frames[labels == 1].mean(0), frames[labels == 0].mean(0)
        contrasts.append(np.abs(inside - outside).max())
    assert len(contrasts) >= 4
    assert 0.5 < np.mean(scores) < 0.999, "objects move, but not by leaps"
    assert np.median(contrasts) > 20


def test_labels_of_training_clips_count_from_one():
    clips = ProceduralClips(size=(64, 64), objects=(1, 3))
    counts = set()
    for seed in range(20):
        clip = clips[seed]
        assert clip.frames.shape == (3, 3, 64, 64) and 0 <= clip.frames.min() and clip.frames.max() <= 1
        assert set(clip.labels[0].unique().tolist()) - {0} == set(range(1, clip.objects + 1))
        assert clip.labels.max() <= clip.objects
        counts.add(clip.objects)
    assert {1, 2, 3} <= counts


@pytest.mark.parametrize("jitter", [0.0, 1.0])
def test_frames_and_labels_are_seen_through_the_same_view(jitter):
    _, labels = procedural_clip(frames=1, size=(96, 128), objects=2, seed=1)
    labels = torch.from_numpy(labels).expand(3, -1, -1)
    # frames that show their own labels: whatever the view, the two must agree
    frames = labels[:, None].expand(-1, 3, -1, -1).float() / 2
    moved = 0
    for seed in range(10):
        clip = random_view(frames, labels, (64, 64), generator(seed), jitter)
        assert clip.frames.shape == (3, 3, 64, 64) and clip.labels.shape == (3, 64, 64)
        seen = (clip.frames[:, 0] * 2).round()
        # outside the picture frames are mirrored and labels are background; between pixels frames are mixed
        disagree = (seen != clip.labels) & (clip.labels > 0)
        assert disagree.float().mean() < 0.02
        moved += bool((clip.labels[0] != clip.labels[2]).any())
    assert moved == (0 if jitter == 0 else 10)


def test_color_keeps_range_and_acts_alike_on_all_frames():
    frame = torch.rand(1, 3, 8, 8, generator=generator())
    changed = random_color(frame.expand(3, -1, -1, -1), generator(1))
    assert 0 <= changed.min() and changed.max() <= 1 and not torch.equal(changed[:1], frame)
    torch.testing.assert_close(changed[0], changed[2])


def test_pasted_objects_become_further_objects():
    one = Clip(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8))
    one.labels[:, :2] = 1
    other = Clip(torch.ones(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8))
    other.labels[:, :, :2] = 1
    seen = set()
    for seed in range(8):
        both = paste_objects(one, other, generator(seed))
        assert set(both.labels.unique().tolist()) == {0, 1, 2}
        assert torch.equal(both.frames[:, 0] == 1, both.labels == 2), "an object's pixels come with its label"
        seen.add(int(both.labels[0, 0, 0]))
    assert seen == {1, 2}, "in front and behind"


def test_objects_too_small_to_see_at_first_are_background():
    labels = torch.zeros(2, 10, 10, dtype=torch.uint8)
    labels[:, :5, :5], labels[:, 9, 9], labels[1, 6:, :4], labels[:, :6, 6:] = 3, 4, 5, 9
    clip = visible_objects(Clip(torch.zeros(2, 3, 10, 10), labels), least_pixels=10)
    assert set(clip.labels.unique().tolist()) == {0, 1, 2} and clip.objects == 2
    assert clip.labels[1, 7, 0] == 0 and clip.labels[0, 9, 9] == 0


@pytest.fixture
def davis_folder(tmp_path):
    """Two sequences of four frames, one annotated 0/255 as DAVIS-2016 is."""
    frames, labels = procedural_clip(frames=4, size=(48, 64), objects=1, seed=2)
    for name, value in (("boat", 1), ("car", 255)):
        for kind in ("JPEGImages", "Annotations"):
            (tmp_path / kind / "480p" / name).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(frames[index]).save(tmp_path / "JPEGImages/480p" / name / f"{index:05d}.jpg")
            mask = (labels[index] * value).astype(np.uint8)
            Image.fromarray(mask).save(tmp_path / "Annotations/480p" / name / f"{index:05d}.png")
    (tmp_path / "ImageSets" / "2016").mkdir(parents=True)
    (tmp_path / "ImageSets/2016/train.txt").write_text("boat\ncar\n")
    return tmp_path


def test_davis_layout(davis_folder):
    boat, car = davis_sequences(davis_folder, "train")
    assert (boat.name, car.name) == ("boat", "car")
    frames, masks = car.load()
    assert len(frames) == len(masks) == 4 and frames[0].shape == (48, 64, 3)
    assert set(np.unique(masks[0])) == {0, 1}
    np.testing.assert_array_equal(masks[0], boat.load()[1][0])


def test_davis_clips_are_functions_of_their_seed(davis_folder):
    clips = DavisClips(davis_sequences(davis_folder, "train"), size=(32, 32))
    first = clips[7]
    assert first.frames.shape == (3, 3, 32, 32) and first.labels.shape == (3, 32, 32)
    assert torch.equal(first.frames, clips[7].frames) and not torch.equal(first.frames, clips[8].frames)


def test_davis_errors_name_what_is_missing(davis_folder):
    with pytest.raises(FileNotFoundError, match="no val.txt under"):
        davis_sequences(davis_folder, "val")
    (davis_folder / "Annotations/480p/car/00002.png").unlink()
    with pytest.raises(ValueError, match="DAVIS sequence car: 4 frames but 3 masks"):
        davis_sequences(davis_folder, "train")
    (davis_folder / "ImageSets/2016/train.txt").write_text("train-ride\n")
    with pytest.raises(FileNotFoundError, match="DAVIS sequence train-ride: no frames"):
        davis_sequences(davis_folder, "train")


def test_training_and_held_out_sequences_are_apart(shared_data):
    root = shared_data / "davis2016-train"
    fit, held = ({sequence.name for sequence in davis_sequences(root, split)} for split in ("fit", "held"))
    assert len(fit) == 24 and len(held) == 6 and not fit & held
