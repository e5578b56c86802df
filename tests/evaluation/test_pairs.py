"""Videos of two objects made of videos of one: what is pasted, where it is written, what is refused."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from answers import gave_up

from stm_model.data.clips import Clip
from stm_model.data.davis import davis_videos
from stm_model.evaluation.pairs import main, pair
from stm_model.io import images
from stm_model.io.masks import write_mask

SIZE = (40, 64)


def moving_square(column: int, colour: tuple[int, int, int], frames: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A square of 12 pixels that sinks by one pixel a frame before a grey ground."""
    pictures_, labels = np.full((frames, *SIZE, 3), 100, np.uint8), np.zeros((frames, *SIZE), np.uint8)
    for index in range(frames):
        square = slice(8 + index, 20 + index), slice(column, column + 12)
        pictures_[index][square], labels[index][square] = colour, 255
    return pictures_, labels


@pytest.fixture
def davis_2016(tmp_path) -> Path:
    """Three videos of one object as DAVIS-2016 has them, white on black; the last is shorter."""
    root = tmp_path / "davis"
    videos = {
        "left": moving_square(4, (250, 0, 0)),
        "too": moving_square(6, (0, 250, 0)),
        "right": moving_square(46, (0, 0, 250), 3),
    }
    for name, (frames, labels) in videos.items():
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / "480p" / name).mkdir(parents=True)
        for index in range(len(frames)):
            images.write_image(root / "JPEGImages/480p" / name / f"{index:05d}.jpg", frames[index])
            write_mask(root / "Annotations/480p" / name / f"{index:05d}.png", labels[index])
    (root / "ImageSets/2016").mkdir(parents=True)
    (root / "ImageSets/2016/held.txt").write_text("left\ntoo\nright\n")
    return root


@pytest.fixture
def run(davis_2016, tmp_path, monkeypatch):
    """Pair the videos into `tmp_path / "pairs"`."""
    return partial(gave_up, main, monkeypatch, "--data", davis_2016, "--out", tmp_path / "pairs")


def test_each_video_shows_its_own_object_and_the_next_ones(run, tmp_path):
    assert run("--distances", "1") is None
    pairs = {sequence.name: sequence for sequence in davis_videos(tmp_path / "pairs", "held")}
    assert {name: len(sequence.frame_paths) for name, sequence in pairs.items()} == {
        "left_too": 4,
        "too_right": 3,
        "right_left": 3,
    }
    # what would lie on the first object is mirrored
    frames, labels = pairs["left_too"].load()
    assert [np.flatnonzero((labels[2] == label).any(0))[[0, -1]].tolist() for label in (1, 2)] == [[4, 15], [46, 57]]
    for index in range(4):
        assert [int((labels[index] == label).sum()) for label in (1, 2)] == [144, 144]
        assert frames[index][12 + index, [8, 50]].argmax(1).tolist() == [0, 1], "red, and green beside it"


def test_one_object_hides_part_of_the_other():
    def clip(column: int) -> Clip:
        labels = torch.zeros(2, *SIZE, dtype=torch.uint8)
        labels[:, 8:28, column : column + 20] = 1
        return Clip(torch.full((2, 3, *SIZE), column / 64), labels)

    # in the middle, so that the mirror image hides as much
    found = {int((pair(clip(22), clip(16), seed).labels[0] == 1).sum()) for seed in range(8)}
    assert found == {400, 400 - 20 * 14}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--split", "none"], "none.txt"),
        (["--distances", "3"], "--distances: expected none that leads back, of 3 videos"),
    ],
)
def test_what_cannot_be_paired_is_refused_and_leaves_nothing(run, tmp_path, options, message):
    assert message in run(*options)
    assert [path.name for path in tmp_path.iterdir()] == ["davis"]


def test_videos_of_two_sizes_are_named_and_leave_nothing(run, davis_2016, tmp_path):
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        for path in (davis_2016 / kind / "480p/right").iterdir():
            picture = np.zeros((48, 64, 3) if suffix == "jpg" else (48, 64), np.uint8)
            (images.write_image if suffix == "jpg" else write_mask)(path, picture)
    assert run() == "pairs: too, right: expected frames of one size, got 64x40 and 64x48"
    assert [path.name for path in tmp_path.iterdir()] == ["davis"]


def test_a_folder_that_exists_stays(run, tmp_path):
    (tmp_path / "pairs").mkdir()
    assert run() == f"pairs: --out: {tmp_path / 'pairs'} exists"
