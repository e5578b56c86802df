"""`--start`, `--end`, `--stride` and `--crop`: which part of a video is tracked, and which masks are of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

# PyAV is imported where it is used: `stm track --help` answers at once
if TYPE_CHECKING:
    import numpy as np

    from stm_model.io.live import LiveVideo
    from stm_model.io.part import Crop, Part
    from stm_model.io.video import Video


@dataclass(frozen=True, kw_only=True)
class PartOptions:
    """Options of a command that takes a part of a video."""

    start: str = "0"
    """The first frame that is tracked: its number, or a time like 1.5s or 0:01:30."""
    end: str | None = None
    """The frame before which tracking ends, likewise; None is the end of the video."""
    stride: int = 1
    """Track every so-many-th frame."""
    crop: str | None = None
    """Track within the rectangle X,Y,W,H alone, in pixels; masks have the video's size."""


class Asked(NamedTuple):
    """What of a video is asked for: frames by number, or by seconds as a fraction."""

    start: int | Fraction
    end: int | Fraction | None
    crop: Crop | None


def asked(config: PartOptions) -> Asked:
    """What the options say. Raises a ValueError that names the one that makes no sense."""
    if config.stride < 1:
        raise ValueError(f"--stride: expected at least 1, got {config.stride}")
    end = None if config.end is None else _moment("--end", config.end)
    return Asked(_moment("--start", config.start), end, None if config.crop is None else _crop(config.crop))


def _moment(option: str, text: str) -> int | Fraction:
    if re.fullmatch(r"\d+", text, re.ASCII):
        return int(text)
    found = re.fullmatch(r"(\d+(?:\.\d*)?)s|(?:(\d+):)?(\d+):(\d+(?:\.\d*)?)", text, re.ASCII)
    if found is None:
        raise ValueError(f"{option}: expected a frame's number or a time, as 12, 1.5s or 0:01:30, got {text!r}")
    seconds, hours, minutes, rest = (Fraction(part or 0) for part in found.groups())
    return seconds + 3600 * hours + 60 * minutes + rest


def _crop(text: str) -> Crop:
    from stm_model.io.part import Crop

    if not re.fullmatch(r"\d+(,\d+){3}", text, re.ASCII):
        raise ValueError(f"--crop: expected X,Y,W,H in pixels, as 200,100,640,480, got {text!r}")
    return Crop(*map(int, text.split(",")))


def check_live(config: PartOptions, address: str) -> None:
    """Raise a ValueError that names an option that live input has nothing for."""
    for name in ("start", "end", "stride"):
        if getattr(config, name) != getattr(PartOptions, name):
            raise ValueError(f"--{name}: expected a video file or a folder of frames, got live input, {address}")


def part_of(config: PartOptions, video: Video | LiveVideo) -> Part:
    """The part of a video that is asked for. Raises a ValueError that names the option where there is none such."""
    from stm_model.io.images import width_by_height
    from stm_model.io.live import LiveVideo
    from stm_model.io.part import Part

    start, end, crop = asked(config)
    if crop and (not crop.width or not crop.height):
        raise ValueError(f"--crop {config.crop}: expected at least one pixel")
    if crop and (crop.left + crop.width > video.size[1] or crop.top + crop.height > video.size[0]):
        raise ValueError(f"--crop {config.crop}: expected a part of the frame, which is {width_by_height(video.size)}")
    if isinstance(video, LiveVideo):
        return Part(video, crop=crop)
    first, last = video.place(start), None if end is None else video.place(end)
    if video.frame_count is not None and first >= video.frame_count:
        raise ValueError(
            f"--start {config.start}: is behind the end of {video.path}, which has {video.frame_count} frames"
        )
    if last is not None and last <= first:
        raise ValueError(f"--end {config.end}: expected a frame behind --start {config.start}")
    return Part(video, first, last, config.stride, crop)


def masks_of(part: Part, given: Mapping[int, np.ndarray], path: Path, late: bool) -> dict[int, np.ndarray]:
    """Of the masks given in a file, by frame of the video, those of a part, by its indices and cropped.

    Raises a ValueError where there are none, where tracking starts without one in the middle of a video, unless the
    first may be `late`, or where the crop holds no object.
    """
    from stm_model.labels import objects_in

    masks = part.masks(given)
    first = part.numbers[0]
    if not masks or (first and not late and 0 not in masks):
        found = part.name(min((number for number in given if number in part.numbers), default=min(given)))
        raise ValueError(
            f"{path}: its first mask is for frame {found}, but tracking starts at frame {part.name(first)}"
        )
    if part.crop and not any(map(objects_in, masks.values())):
        raise ValueError(f"--crop: no object of {path} is in it")
    if unused := [part.name(number) for number in given if number not in part.numbers]:
        shown = ", ".join(map(str, unused[:5])) + (", …" if len(unused) > 5 else "")
        warnings.warn(f"masks of frames that are not tracked are not used: {shown}", stacklevel=1)
    return masks
