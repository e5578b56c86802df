"""Parts of a video that there are not, or that no mask is of."""

from pathlib import Path
from shutil import copy, copytree

import pytest
from table import Fault, each, judge
from test_given_masks import masks

from stm_model.io.images import MediaError
from stm_model.io.part import Part
from stm_model.io.video import open_video


def wrong(name: str, line: str, *extra: str, given: dict[str, int] | None = None) -> Fault:
    """Options that are refused, with masks by name and frame."""
    return Fault(
        name,
        lambda clip, made: {"extra": extra, **({"mask": masks(clip, made, given)} if given else {})},
        line,
    )


def alone(clip: Path, made: Path) -> Path:
    """The mask of frame 0 by its name."""
    return Path(copy(clip / "true" / "00000.png", made))


def twice(clip: Path, made: Path) -> Path:
    """Two frames of one name."""
    copytree(clip / "frames", made / "frames")
    (made / "frames" / "00003.png").rename(made / "frames" / "00002.bmp")
    return made / "frames"


FAULTS = [
    wrong("an end at the start", "--end 3: expected a frame behind --start 3", "--start", "3", "--end", "3"),
    wrong("an end before the start", "--end 0.1s: expected a frame behind --start 3", "--start", "3", "--end", "0.1s"),
    wrong("an end at 0", "--end 0: expected a frame behind --start 0", "--end", "0"),
    wrong("a start behind the end", "--start 10: is behind the end of", "--start", "10"),
    wrong("a time behind the end", "--start 0:01:30: is behind the end of", "--start", "0:01:30"),
    wrong("no moment", "--start: expected a frame's number or a time, as 12, 1.5s or 0:01:30, got 'x'", "--start=x"),
    wrong("a moment before the start", "--end: expected a frame's number or a time, as 12", "--end=-3"),
    wrong("a stride of 0", "--stride: expected at least 1, got 0", "--stride", "0"),
    wrong("a crop of three numbers", "--crop: expected X,Y,W,H in pixels, as 200,100,640,480", "--crop", "1,2,3"),
    wrong("a crop below 0", "--crop: expected X,Y,W,H in pixels", "--crop=-1,0,20,20"),
    wrong("an empty crop", "--crop 0,0,0,20: expected at least one pixel", "--crop", "0,0,0,20"),
    wrong("a crop outside", "--crop 70,0,11,20: expected a part of the frame, which is 80x48", "--crop", "70,0,11,20"),
    wrong("a crop below", "--crop 0,40,9,9: expected a part of the frame, which is 80x48", "--crop", "0,40,9,9"),
    wrong("a crop without an object", "--crop: no object of", "--crop", "0,0,1,1"),
    wrong(
        "a first mask before the start",
        "its first mask is for frame 0, but tracking starts at frame 2",
        *("--start", "2"),
        given={"00000.png": 0},
    ),
    wrong(
        "a first mask behind the start",
        "its first mask is for frame 5, but tracking starts at frame 2",
        *("--start", "2"),
        given={"00000.png": 0, "00005.png": 5},
    ),
    wrong(
        "a mask that the stride passes over",
        "its first mask is for frame 3, but tracking starts at frame 0",
        *("--stride", "2"),
        given={"00003.png": 3},
    ),
    Fault(
        "one mask, of another frame by its name",
        lambda clip, made: {"extra": ("--start", "2"), "mask": alone(clip, made)},
        "00000.png: is the mask of another frame, by its name, than the first that is tracked",
    ),
    Fault(
        "two frames of one name",
        lambda clip, made: {"video": twice(clip, made)},
        "00002.png: its mask would have the name of that of 00002.bmp; rename one of them",
    ),
    *(
        Fault(
            f"--{name} of live input",
            lambda clip, made, name=name: {"extra": (f"--{name}", "2"), "video": "-"},
            f"--{name}: expected a video file or a folder of frames, got live input, -",
        )
        for name in ("start", "end", "stride")
    ),
]


@each(FAULTS)
def test_the_line_and_what_is_kept(fault, track, clip, tmp_path, out):
    judge(fault, track, clip, tmp_path / "made", out)


def test_a_folder_whose_masks_have_one_name_is_no_part(clip, tmp_path):
    with pytest.raises(MediaError, match="would have the name"):
        Part(open_video(twice(clip, tmp_path)))
