"""Masks that belong to no frame, or to another one than they seem to."""

from pathlib import Path

import numpy as np
import pytest
from table import Fault, each, judge
from test_broken_videos import damaged

from stm_model.io.masks import read_mask, read_masks
from stm_model.io.video import open_video


def masks(clip: Path, made: Path, named: dict[str, int]) -> Path:
    """A folder of true masks by name and frame."""
    folder = made / "masks"
    folder.mkdir()
    for name, index in named.items():
        (folder / name).write_bytes((clip / "true" / f"{index:05d}.png").read_bytes())
    return folder


def frames(clip: Path, made: Path, pattern: str, first: int) -> Path:
    """The clip's frames by other names."""
    folder = made / "frames"
    folder.mkdir()
    for index, file in enumerate(sorted((clip / "frames").iterdir())):
        (folder / pattern.format(index + first)).write_bytes(file.read_bytes())
    return folder


FAULTS = [
    Fault(
        "masks that count from 1, and frames that do too, by other names",
        lambda clip, made: {
            "video": frames(clip, made, "img_{:05d}.png", 1),
            "mask": masks(clip, made, {"00001.png": 0}),
        },
        "",
        code=0,
        masks=10,
        named="img_{:05d}.png",
        first=1,
    ),
    Fault(
        "masks that count from 0, and frames that count from 1, by other names",
        lambda clip, made: {
            "video": frames(clip, made, "img_{:05d}.png", 1),
            "mask": masks(clip, made, {"00000.png": 0}),
        },
        "masks/00000.png: a mask for frame 0, but",
    ),
    Fault(
        "masks that count from 0, and frames that count from 1, by the same names",
        lambda clip, made: {
            "video": frames(clip, made, "{:05d}.png", 1),
            "mask": masks(clip, made, {"00000.png": 0, "00001.png": 1}),
        },
        "masks/00000.png: expected the name of a frame of the video",
    ),
    Fault(
        "masks of a video file that count from 1",
        lambda clip, made: {"mask": masks(clip, made, {"00001.png": 0, "00004.png": 3})},
        "stm: warning: the first mask is for frame 1, counted from 0: in the 1 before it all is background; "
        "--both-ways tracks it back to the start",
        code=0,
        masks=10,
    ),
    Fault(
        "a mask beyond the last frame",
        lambda clip, made: {"mask": masks(clip, made, {"00000.png": 0, "00010.png": 9})},
        "a mask for frame 10, but",
    ),
    Fault(
        "a mask for a frame that a broken video does not reach",
        lambda clip, made: {
            "video": damaged(clip, made, [8, 9]),
            "mask": masks(clip, made, {"00000.png": 0, "00009.png": 9}),
        },
        "breaks off after 8 of 10 frames (Invalid data found when processing input); the masks of frames [9] were not "
        "used",
        masks=8,
    ),
]


@each(FAULTS)
def test_the_line_and_what_is_kept(fault, track, clip, tmp_path, out):
    judge(fault, track, clip, tmp_path / "made", out)


def test_masks_go_by_the_numbers_of_the_frames(clip, tmp_path):
    video = open_video(frames(clip, tmp_path, "img_{:05d}.png", 1))
    found = read_masks(masks(clip, tmp_path, {"00001.png": 0, "mask_7.png": 6}), video)
    assert list(found) == [0, 6]
    for index, labels in found.items():
        np.testing.assert_array_equal(labels, read_mask(clip / "true" / f"{index:05d}.png"))


def test_frames_without_numbers_are_counted(clip, tmp_path):
    video = open_video(frames(clip, tmp_path, "f{}x.png", 0))
    assert list(read_masks(masks(clip, tmp_path, {"00003.png": 3}), video)) == [3]
    with pytest.raises(ValueError, match="a mask for frame 12"):
        read_masks(masks(clip, tmp_path / "frames", {"12.png": 3}), video)
