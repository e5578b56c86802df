"""Clips: procedural ones, folders in the DAVIS layout, augmentation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from stm_model.data.augment import (
    DegradedClips,
    paste_objects,
    random_color,
    random_degradation,
    random_region,
    random_view,
    thin_plate_field,
    visible_objects,
)
from stm_model.data.clips import Clip, FollowedClips, MixedClips
from stm_model.data.clips import generator as generator_of
from stm_model.data.crowd import CollageClips
from stm_model.data.davis import davis_videos, find_list
from stm_model.data.images import ImageClips, frames_as_images
from stm_model.data.synthetic import ProceduralClips, procedural_clip
from stm_model.data.video import VideoClips, pick_frames
from stm_model.evaluation.metrics import region_similarity
from stm_model.training.config import TrainConfig
from stm_model.training.datasets import training_clips


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


@pytest.mark.parametrize("jitter, bend", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_frames_and_labels_are_seen_through_the_same_view(jitter, bend):
    _, labels = procedural_clip(frames=1, size=(96, 128), objects=2, seed=1)
    labels = torch.from_numpy(labels).expand(3, -1, -1)
    # frames that show their own labels: whatever the view, the two must agree
    frames = labels[:, None].expand(-1, 3, -1, -1).float() / 2
    moved = 0
    for seed in range(10):
        clip = random_view(frames, labels, (64, 64), generator(seed), jitter, bend)
        assert clip.frames.shape == (3, 3, 64, 64) and clip.labels.shape == (3, 64, 64)
        seen = (clip.frames[:, 0] * 2).round()
        # outside the picture frames are mirrored and labels are background; between pixels frames are mixed
        disagree = (seen != clip.labels) & (clip.labels > 0)
        assert disagree.float().mean() < 0.02
        moved += bool((clip.labels[0] != clip.labels[2]).any())
    assert moved == (10 if jitter or bend else 0)


def test_color_keeps_range_and_acts_alike_on_all_frames():
    frame = torch.rand(1, 3, 8, 8, generator=generator())
    changed = random_color(frame.expand(3, -1, -1, -1), generator(1))
    assert 0 <= changed.min() and changed.max() <= 1 and not torch.equal(changed[:1], frame)
    torch.testing.assert_close(changed[0], changed[2])
    assert torch.equal(random_color(frame, generator(1), strength=0), frame)


def test_degraded_frames_lose_detail_and_nothing_else():
    y, x = torch.meshgrid(torch.arange(96), torch.arange(160), indexing="ij")
    coarse, fine = 0.5 + 0.3 * torch.sin(x / 30), 0.1 * (-1.0) ** (x // 3 + y // 3)
    frames = (coarse + fine).expand(3, 3, -1, -1)
    detail = []
    for seed in range(10):
        degraded = random_degradation(frames, generator(seed))
        assert degraded.shape == frames.shape and 0 <= degraded.min() and degraded.max() <= 1
        # what does not move still does not
        assert torch.equal(degraded[0], degraded[2])
        inside = degraded[0, 0, 8:-8, 8:-8] - coarse[8:-8, 8:-8]
        assert F.avg_pool2d(inside[None], 16).abs().max() < 0.03
        detail.append(float(inside.std()) / 0.1)
    assert min(detail) < 0.3 < max(detail) and max(detail) < 1.1
    assert torch.equal(random_degradation(frames, generator(3)), random_degradation(frames, generator(3)))


def test_a_share_of_the_clips_is_degraded():
    clips = ProceduralClips(2, (64, 64))
    share = DegradedClips(clips, 0.5)
    changed = [not torch.equal(share[seed].frames, clips[seed].frames) for seed in range(40)]
    assert 10 <= sum(changed) <= 30
    assert all(torch.equal(share[seed].labels, clips[seed].labels) for seed in range(40))


def two_clips() -> tuple[Clip, Clip]:
    """A black clip with an object in its upper half, a white one with an object in its left half."""
    one = Clip(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8))
    one.labels[:, :4] = 1
    other = Clip(torch.ones(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8))
    other.labels[:, :, :4] = 1
    return one, other


def test_pasted_objects_become_further_objects():
    one, other = two_clips()
    seen = set()
    for seed in range(8):
        both = paste_objects(one, other, generator(seed))
        assert set(both.labels.unique().tolist()) == {0, 1, 2}
        # the pasted object's own pixels come with its label, mixed with what is below on its edge alone
        assert torch.equal(both.frames[:, 0] > 0, both.labels == 2)
        assert (both.frames[:, 0, 5:, :3] == 1).all()
        seen.add(int(both.labels[0, 0, 0]))
    assert seen == {1, 2}, "in front and behind"


def test_a_pasted_distractor_is_background():
    one, other = two_clips()
    both = paste_objects(one, other, generator(), labelled=False)
    assert (both.labels[:, :, :4] == 0).all() and (both.labels[:, :4, 4:] == 1).all()
    assert torch.equal(both.frames[:, 0] > 0, other.labels == 1)


def test_void_is_not_pasted_and_stays_void():
    one, other = two_clips()
    one.labels[:, 7, 7], other.labels[:, 0, 0] = 255, 255
    both = paste_objects(one, other, generator(), labelled=False)
    assert both.labels[0, 7, 7] == 255 and both.labels[0, 0, 0] == 1 and both.frames[0, 0, 0, 0] == 0
    assert visible_objects(one, least_pixels=1).labels[0, 7, 7] == 255 and one.objects == 1


def test_thin_plates_go_through_their_points_and_keep_affine_maps():
    random = generator()
    points, shifts = torch.rand(9, 2, generator=random), torch.randn(3, 9, 2, generator=random)
    field = thin_plate_field(points, shifts, points[None])
    torch.testing.assert_close(field[:, 0], shifts, atol=1e-4, rtol=0)
    matrix, offset = torch.randn(2, 2, generator=random), torch.randn(2, generator=random)
    positions = torch.rand(5, 6, 2, generator=random)
    field = thin_plate_field(points, (points @ matrix + offset)[None], positions)
    torch.testing.assert_close(field[0], positions @ matrix + offset, atol=1e-3, rtol=0)


def test_regions_are_of_one_piece_and_vary():
    shares = []
    for seed in range(20):
        region = random_region((60, 80), generator(seed))
        assert region.shape == (60, 80) and region.dtype == torch.bool
        shares.append(region.float().mean().item())
    assert 0.01 < min(shares) and max(shares) < 0.9 and np.std(shares) > 0.05


def test_seeds_that_differ_in_their_high_bits_alone_differ():
    draws = {float(torch.rand((), generator=generator_of(seed << 32, 1))) for seed in range(5)}
    assert len(draws) == 5
    assert torch.rand((), generator=generator_of(3, 4)) == torch.rand((), generator=generator_of(3, 4))


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
    boat, car = davis_videos(davis_folder, "train")
    assert (boat.name, car.name) == ("boat", "car")
    frames, masks = car.load()
    assert len(frames) == len(masks) == 4 and frames[0].shape == (48, 64, 3)
    assert set(np.unique(masks[0])) == {0, 1}
    np.testing.assert_array_equal(masks[0], boat.load()[1][0])


def test_of_two_lists_of_a_name_the_larger_year_counts(davis_folder):
    (davis_folder / "ImageSets" / "2017").mkdir()
    (davis_folder / "ImageSets/2017/train.txt").write_text("car\n")
    assert [sequence.name for sequence in davis_videos(davis_folder, "train")] == ["car"]


def test_davis_clips_are_functions_of_their_seed(davis_folder):
    clips = VideoClips(davis_videos(davis_folder, "train"), size=(32, 32))
    first = clips[7]
    assert first.frames.shape == (3, 3, 32, 32) and first.labels.shape == (3, 32, 32)
    assert torch.equal(first.frames, clips[7].frames) and not torch.equal(first.frames, clips[8].frames)


@pytest.mark.parametrize("color, motion", [(0.0, 0.0), (0.0, 0.3), (0.3, 0.0)])
def test_color_and_motion_can_be_left_as_they_are(tmp_path, color, motion):
    """A video that stands still, of one colour but for its object."""
    for kind in ("JPEGImages", "Annotations"):
        (tmp_path / kind / "480p" / "still").mkdir(parents=True)
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[10:30, 20:40] = 1
    for index in range(4):
        Image.fromarray(np.full((48, 64, 3), (40, 90, 200), np.uint8)).save(
            tmp_path / "JPEGImages/480p/still" / f"{index:05d}.jpg", quality=100
        )
        Image.fromarray(mask).save(tmp_path / "Annotations/480p/still" / f"{index:05d}.png")
    (tmp_path / "ImageSets" / "2016").mkdir(parents=True)
    (tmp_path / "ImageSets/2016/train.txt").write_text("still\n")
    plain = {"stills": 0.0, "procedural": 0.0, "paste": 0.0, "distract": 0.0, "replace": 0.0, "validation_split": None}
    config = TrainConfig(tmp_path / "run", data=(tmp_path,), crop=32, color=color, motion=motion, **plain)
    dataset = training_clips(config)
    clips = [dataset[seed] for seed in range(6)]
    true = torch.tensor([40, 90, 200]).view(3, 1, 1) / 255
    assert all(((clip.frames - true).abs().max() < 0.02) == (not color) for clip in clips)
    assert all(torch.equal(clip.labels[0], clip.labels[2]) for clip in clips) == (not motion)


def test_frames_are_picked_in_order_within_the_skip():
    random, directions = generator(), set()
    for _ in range(200):
        picked = pick_frames(list(range(0, 100, 5)), 4, 12, random)
        steps = np.diff(picked)
        assert set(np.abs(steps)) <= {5, 10} and len(set(np.sign(steps))) == 1
        directions.add(int(np.sign(steps[0])))
    assert directions == {-1, 1}
    # masks farther apart than the skip: the next one; fewer masks than asked for: the last repeats
    assert sorted(pick_frames([0, 50, 100], 3, 5, random)) == [0, 50, 100]
    assert sorted(pick_frames([3, 9], 4, 25, random)) == [3, 9, 9, 9]
    assert pick_frames([7], 3, 25, random) == [7, 7, 7]


def test_every_frame_can_be_picked():
    random = generator()
    picked = {index for _ in range(500) for index in pick_frames(list(range(9)), 3, 4, random)}
    assert picked == set(range(9))


def test_the_skip_grows_with_the_number_of_clips(davis_folder):
    clips = VideoClips(davis_videos(davis_folder, "train"), max_skip=(5, 25), growth=100)
    run = 3 << 32
    assert [clips._max_skip(run + number) for number in (0, 50, 100, 10**6)] == [5, 15, 25, 25]


def test_mixed_clips_keep_the_weights():
    class Constant(torch.utils.data.Dataset):
        def __init__(self, value):
            self.value = value

        def __getitem__(self, seed):
            return self.value

    mixed = MixedClips([Constant(0), Constant(1), Constant(2)], [3, 0, 1])
    drawn = [mixed[seed] for seed in range(1000)]
    assert drawn.count(1) == 0 and 200 < drawn.count(2) < 300
    assert drawn == [mixed[seed] for seed in range(1000)]
    with pytest.raises(ValueError, match="weights: expected one for each of 1 datasets, got 2"):
        MixedClips([Constant(0)], [1, 2])
    with pytest.raises(ValueError, match="weights: expected some above 0"):
        MixedClips([Constant(0)], [0])


def test_images_become_clips_with_motion(davis_folder):
    images = frames_as_images(davis_videos(davis_folder, "train"))
    assert len(images) == 8
    clips, moved = ImageClips(images, size=(32, 32)), 0
    for seed in range(10):
        clip = clips[seed]
        assert clip.frames.shape == (3, 3, 32, 32) and clip.labels.max() <= 1
        moved += bool((clip.labels[0] != clip.labels[2]).any())
    assert moved >= 8


def test_collages_of_each_kind(davis_folder):
    sequences = davis_videos(davis_folder, "train")
    below, regions = (
        VideoClips(sequences, size=(32, 32)),
        ImageClips(frames_as_images(sequences), size=(32, 32), regions=True),
    )
    for shares, most in (((1, 0, 0), 2), ((0, 1, 0), 1), ((0, 0, 1), 1)):
        collage = CollageClips(below, regions, *shares)
        clips = [collage[seed] for seed in range(20)]
        assert max(clip.objects for clip in clips) == most
        changed = sum(not torch.equal(clip.frames, below[seed].frames) for seed, clip in enumerate(clips))
        assert changed >= 15, "something is pasted on nearly every clip"
    assert torch.equal(CollageClips(below, regions, 0, 0, 0)[3].frames, below[3].frames)
    with pytest.raises(ValueError, match="sum of at most 1"):
        CollageClips(below, regions, 0.5, 0.5, 0.5)


def test_clips_without_an_object_are_drawn_anew():
    class Sometimes(torch.utils.data.Dataset):
        """An object in every fourth draw of the same clip."""

        def __getitem__(self, seed):
            labels = torch.full((2, 4, 4), int((seed >> 40) % 4 == 3), dtype=torch.uint8)
            return Clip(torch.zeros(2, 3, 4, 4), labels, (f"problem {seed >> 40}",))

    clip = FollowedClips(Sometimes())[5]
    assert clip.objects == 1 and clip.unreadable == ("problem 0", "problem 1", "problem 2", "problem 3")

    class Never(Sometimes):
        def __getitem__(self, seed):
            return Clip(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8))

    with pytest.raises(ValueError, match="no object in the first frame of 64 clips"):
        FollowedClips(Never())[5]


def test_davis_errors_name_what_is_missing(davis_folder):
    with pytest.raises(
        FileNotFoundError, match="DAVIS split val: no such file: .*2017/val.txt; the package has fit, held"
    ):
        davis_videos(davis_folder, "val")
    (davis_folder / "Annotations/480p/car/00002.png").unlink()
    with pytest.raises(FileNotFoundError, match="DAVIS video car: frame 00002 has no annotation in"):
        davis_videos(davis_folder, "train")
    (davis_folder / "ImageSets/2016/train.txt").write_text("train-ride\n")
    with pytest.raises(FileNotFoundError, match="DAVIS video train-ride: no pictures in"):
        davis_videos(davis_folder, "train")


def test_the_shipped_lists_are_apart_and_make_up_the_training_split(shared_data):
    fit, held = (set(find_list(Path("nowhere"), split).read_text().split()) for split in ("fit", "held"))
    assert len(fit) == 24 and len(held) == 6 and not fit & held
    root = shared_data / "davis2016-train"
    assert fit | held == {video.name for video in davis_videos(root, "train")}
