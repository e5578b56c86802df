"""Videos of pictures: folders of frames, and animated WebP and GIF files, of which Pillow knows the times."""

import math
import sys
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np

from stm_model.io.damage import BrokenVideo
from stm_model.io.images import (
    IMAGE_SUFFIXES,
    MediaError,
    file_number,
    open_picture,
    picture_files,
    picture_size,
    read_image,
    reason,
    width_by_height,
)

FOLDER_FPS = Fraction(24)
EVERY = range(sys.maxsize)
"""The numbers of all frames."""
USUAL_DURATION = 100
"""Milliseconds of a frame that says none, as browsers show it."""


class Source:
    """A video of which the frames of some numbers can be had; see `open_video`."""

    files: tuple[Path, ...] = ()
    numbers: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.frames(EVERY)

    def frames(self, numbers: range) -> Iterator[np.ndarray]:
        """The frames of these numbers, as iterating gives them."""
        raise NotImplementedError

    def frames_from(self, start: int) -> Iterator[np.ndarray]:
        """The frames from number `start` on."""
        return self.frames(EVERY[start:])


class FrameFolder(Source):
    """A folder of pictures as a video; see `open_video`."""

    fps = FOLDER_FPS

    def __init__(self, path: Path):
        self.path, self.name = path, path.resolve().name
        self.files = tuple(picture_files(path))
        if not self.files:
            raise MediaError(f"{path}: no frames; expected pictures ({' '.join(sorted(IMAGE_SUFFIXES))})")
        self.size = picture_size(self.files[0])
        for file in self.files[1:]:
            if (size := picture_size(file)) != self.size:
                raise MediaError(
                    f"{file}: {width_by_height(size)} pixels, but the frames before it are {width_by_height(self.size)}"
                )
        self.frame_count = len(self.files)
        numbers = dict.fromkeys(map(file_number, self.files))
        whole = None not in numbers and len(numbers) == len(self.files)
        self.numbers = tuple(number for number in numbers if number is not None) if whole else ()
        """In which the frames' names end, where each has one of its own: they may count from 1, or with gaps."""

    def frames(self, numbers: range) -> Iterator[np.ndarray]:
        for index, file in enumerate(self.files):
            if index not in numbers:
                continue
            try:
                frame = read_image(file)
            except MediaError as error:
                raise BrokenVideo(f"{error}; {index} of {self.frame_count} frames read", index) from error
            yield frame

    def place(self, at: int | Fraction) -> int:
        """Where the first frame of this number or a later one is, or the first from so many seconds on."""
        if isinstance(at, Fraction):
            return math.ceil(at * self.fps)
        numbers = self.numbers or range(self.frame_count)
        return next((index for index, number in enumerate(numbers) if number >= at), self.frame_count)


def is_animation(path: Path) -> bool:
    """Whether a file is a WebP or a GIF, of one frame or many."""
    with suppress(OSError), open(path, "rb") as file:
        head = file.read(12)
        return head.startswith(b"GIF8") or (head.startswith(b"RIFF") and head.endswith(b"WEBP"))
    return False


class Animation(Source):
    """An animated WebP or GIF; see `open_video`. What is transparent has the color that is stored there."""

    time_base = Fraction(1, 1000)

    def __init__(self, path: Path):
        self.path, self.name = path, path.stem
        with open_picture(path) as image:
            self.size = (image.height, image.width)
            self.frame_count = getattr(image, "n_frames", 1)
            durations = []
            for index in range(self.frame_count):
                try:
                    image.seek(index)
                    # WebP's is not known before
                    image.load()
                except (OSError, EOFError, SyntaxError, ValueError):
                    break
                durations.append(round(image.info.get("duration", 0)) or USUAL_DURATION)
        if not durations:
            raise MediaError(f"{path}: no frame in it can be decoded")
        self.times = list(accumulate(durations, initial=0))[:-1]
        """When each frame is shown, in milliseconds."""
        self.fps = Fraction(1000 * len(durations), sum(durations))

    def frames(self, numbers: range) -> Iterator[np.ndarray]:
        with open_picture(self.path) as image:
            for index in range(self.frame_count):
                if index not in numbers:
                    continue
                try:
                    image.seek(index)
                    frame = np.array(image.convert("RGB"))
                except (OSError, EOFError, SyntaxError, ValueError) as error:
                    message = f"the video breaks off after {index} of {self.frame_count} frames ({reason(error)})"
                    raise BrokenVideo(f"{self.path}: {message}", index) from error
                yield frame

    def place(self, at: int | Fraction) -> int:
        """The number of a frame by itself, or of the first that is shown from so many seconds on."""
        return bisect_left(self.times, math.ceil(at / self.time_base)) if isinstance(at, Fraction) else at
