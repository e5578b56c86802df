"""Cut-outs on clips: who is followed, how they move, and that a clip is a function of its number."""

import numpy as np
import pytest
import torch

from stm_model.data import crowd
from stm_model.data.augment import followed_objects
from stm_model.data.clips import Clip, generator
from stm_model.data.crowd import CrowdClips, CutOut, instance, move, random_paths, twin
from stm_model.io.images import MediaError

SIZE = (64, 96)


class Squares(torch.utils.data.Dataset):
    """Clips of four grey frames in which a red square, object 1, moves to the right."""

    def __getitem__(self, seed):
        frames, labels = torch.full((4, 3, *SIZE), 0.5), torch.zeros(4, *SIZE, dtype=torch.uint8)
        for time in range(4):
            place = slice(10, 30), slice(8 + 6 * time, 28 + 6 * time)
            frames[(time, slice(None), *place)] = torch.tensor([1.0, 0, 0])[:, None, None]
            labels[time][place] = 1
        return Clip(frames, labels)


class Blue:
    """An image with a blue disk, and another object too small to be cut out."""

    def load(self):
        y, x = np.mgrid[:60, :80]
        labels = ((y - 30) ** 2 + (x - 40) ** 2 < 400).astype(np.uint8)
        labels[0, 0] = 2
        return np.where(labels[..., None] == 1, np.uint8([0, 0, 255]), np.uint8([90, 90, 90])), labels


class Broken:
    def load(self):
        raise MediaError("broken.jpg: cannot be read")


def red(frames):
    return (frames[..., 0, :, :] > 0.9) & (frames[..., 1, :, :] < 0.1)


def blue(frames):
    return (frames[..., 2, :, :] > 0.9) & (frames[..., 0, :, :] < 0.1)


def crowds(monkeypatch, twins, followed, images=None, twice=0.0, in_front=1.0):
    for name, value in (("TWIN", twins), ("FOLLOWED", followed), ("TWICE", twice), ("IN_FRONT", in_front)):
        monkeypatch.setattr(crowd, name, value)
    return CrowdClips(Squares(), [Blue()] if images is None else images, 1.0, color=0.0)


@pytest.mark.parametrize("followed", [0.0, 1.0])
def test_a_twin_looks_like_the_object_and_is_followed_or_not(monkeypatch, followed):
    clips = crowds(monkeypatch, 1.0, followed, in_front=0.0)
    truth = Squares()[0].labels[0] == 1
    twins = labelled = 0
    for seed in range(20):
        clip = clips[seed]
        # behind the object, so that it is whole
        assert torch.equal(clip.labels[0] == 1, truth)
        seen = red(clip.frames[0]) & ~truth
        twins += int(seen.sum())
        labelled += int((seen & (clip.labels[0] > 1)).sum())
    assert twins > 20 * 200
    # a followed one of which few pixels are in view is background
    assert labelled == 0 if followed == 0 else labelled > 0.98 * twins


def test_instances_are_pasted_twice_and_half_of_them_followed(monkeypatch):
    clips = crowds(monkeypatch, 0.0, 0.5, twice=1.0)
    blues, followed = 0, 0
    for seed in range(40):
        clip = clips[seed]
        seen = blue(clip.frames[0])
        blues += int(seen.sum())
        followed += int((seen & (clip.labels[0] > 0)).sum())
    assert blues > 5000
    assert 0.3 < followed / blues < 0.7


def test_a_clip_is_a_function_of_its_number():
    clips = CrowdClips(Squares(), [Blue()], 1.0)
    for seed in (3, 2**32 + 5):
        ours, again = clips[seed], CrowdClips(Squares(), [Blue()], 1.0)[seed]
        assert torch.equal(ours.frames, again.frames) and torch.equal(ours.labels, again.labels)
    assert not torch.equal(clips[3].frames, clips[4].frames)


def test_no_clip_has_more_objects_than_it_may(monkeypatch):
    monkeypatch.setattr(crowd, "FOLLOWED", 1.0)
    clips = CrowdClips(Squares(), [Blue()], 1.0, most_objects=2)
    counts = {clips[seed].objects for seed in range(10)}
    assert max(counts) == 2
    none = CrowdClips(Squares(), [Blue()], 0.0)[1]
    assert torch.equal(none.frames, Squares()[1].frames) and torch.equal(none.labels, Squares()[1].labels)


def test_an_image_that_cannot_be_read_is_named_and_passed_over(monkeypatch):
    clip = crowds(monkeypatch, 0.0, 1.0, images=[Broken()])[0]
    assert set(clip.unreadable) == {"broken.jpg: cannot be read"}
    assert torch.equal(clip.labels, Squares()[0].labels)
    assert crowds(monkeypatch, 0.0, 1.0, images=[])[0].unreadable == ()


def test_a_cut_out_is_where_its_path_says():
    layers = torch.zeros(1, 4, 20, 30)
    layers[:, 3, 5:15, 10:20] = 1
    path = torch.tensor([[-0.5, 0.25], [0.0, 0.0], [0.5, -0.25]])
    seen = move(CutOut(layers, torch.tensor([[15.0, 10.0]]), 1.5), path, SIZE, 1.0, generator(1))[:, 3] > 0.5
    for mask, (x, y) in zip(seen, path.tolist(), strict=True):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        assert float(columns.float().mean()) + 0.5 == pytest.approx((x + 1) * SIZE[1] / 2, abs=1)
        assert float(rows.float().mean()) + 0.5 == pytest.approx((y + 1) * SIZE[0] / 2, abs=1)
        # ten by ten pixels, one and a half times as large; it grows and is stretched by a few percent a frame
        assert 225 / 1.6 < mask.sum() < 225 * 1.6


def test_paths_cross_and_leave_the_view_and_come_back():
    clip = Squares()[0]
    met = left = 0
    for seed in range(100):
        paths = random_paths(clip, 2, generator(seed))
        met += bool(((paths[0][0] - paths[1][-1]).norm() < 0.6) and ((paths[1][0] - paths[0][-1]).norm() < 0.6))
        outside = [(path.abs() > 1).any(1) for path in paths]
        left += any(not out[0] and out[1:-1].any() and not out[-1] for out in outside)
    assert met > 25
    assert left > 10


def test_a_hidden_twin_shows_what_it_showed_last():
    clip = Squares()[0]
    clip.labels[2] = 0
    drawn = [twin(clip, generator(seed)) for seed in range(6)]
    for cut_out in drawn:
        assert (cut_out.layers[:, 3].flatten(1).sum(1) == 400).all()
    clip.labels[0] = 0
    assert Clip(clip.frames, clip.labels).objects == 0


def test_the_largest_instance_is_cut_out():
    for seed in range(5):
        cut_out = instance(Blue(), SIZE, generator(seed), 0.0)
        inside = cut_out.layers[0, 3] > 0.5
        assert blue(cut_out.layers[:, :3])[0][inside].float().mean() > 0.5


def test_a_share_of_the_instances_is_followed():
    labels = torch.zeros(1, 40, 40, dtype=torch.uint8)
    for label in range(1, 9):
        labels[0, 4 * label : 4 * label + 4] = label
    labels[0, 0, 0], labels[0, 39, 39] = 255, 9
    clip, counts, kept = Clip(torch.zeros(1, 3, 40, 40), labels), [], torch.zeros(10)
    for seed in range(200):
        followed = followed_objects(clip, 0.5, generator(seed), least_share=0.01).labels
        counts.append(int(followed.masked_fill(followed == 255, 0).max()))
        assert followed[0, 0, 0] == 255 and followed[0, 39, 39] == 0
        kept[labels[followed > 0].unique().long().clamp(max=9)] += 1
    assert min(counts) >= 1 and np.mean(counts) == pytest.approx(4, abs=0.4)
    assert (kept[1:9] > 60).all() and (kept[1:9] < 140).all()
    assert followed_objects(clip, 0.0, generator(0)).objects == 1
