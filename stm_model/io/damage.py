"""What tells that a video file is damaged or cut off, where FFmpeg itself says nothing."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np

from stm_model.io.images import MediaError

TRANSPORT_PACKETS = ((188, 0), (192, 4), (204, 0))
"""Sizes of a transport stream's packets, and where in one its first byte, 0x47, is."""


class BrokenVideo(MediaError):
    """A video that stops before its end, or some of whose frames are damaged; `frames_read` frames came out before
    that.
    """

    def __init__(self, message: str, frames_read: int):
        super().__init__(message)
        self.frames_read = frames_read


class Break(Exception):
    """Why a video cannot be decoded any further."""


class Clock:
    """Compares where a stream ends with where its file says so: FFmpeg reports nothing where an mkv or avi is cut."""

    def __init__(self, container, stream, fps: Fraction):
        self.fps = fps
        self.packets, self.listed = 0, stream.frames if "mp4" in container.format.name else 0
        self.start: Fraction | None = None
        self.end: Fraction | None = None
        self.expected: Fraction | None = None
        if tag := re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", "")):
            self.expected = int(tag[1]) * 3600 + int(tag[2]) * 60 + Fraction(tag[3])
        elif container.format.name == "avi" and stream.frames:
            self.expected = stream.frames / fps
        elif stream.duration:
            self.expected = stream.duration * stream.time_base

    def skip(self, start: Fraction) -> None:
        """The stream, which starts there, is read from somewhere later on."""
        self.listed, self.start = 0, start

    def see(self, packet) -> None:
        self.packets += packet.size > 0
        if packet.pts is not None:
            start = packet.pts * packet.time_base
            end = start + (packet.duration * packet.time_base if packet.duration else 1 / self.fps)
            self.start = start if self.start is None else min(start, self.start)
            self.end = end if self.end is None else max(end, self.end)

    def shortfall(self) -> str | None:
        """What is missing, if the stream ends early."""
        if self.packets < self.listed:
            return f"it holds {self.packets} of {self.listed} packets"
        if self.start is None or self.end is None or self.expected is None:
            return None
        # some files count from their first frame, some from zero
        if max(self.end, self.end - self.start) >= self.expected - Fraction(1, 10) - 2 / self.fps:
            return None
        return f"it ends at {float(self.end):.2f} s of {float(self.expected):.2f} s"


def lost_times(times: list[int]) -> list[int]:
    """The time stamps that are missing among those of frames at a constant rate, in gaps of up to a dozen frames."""
    times = sorted(times)
    gaps = np.diff(times)
    if not len(gaps) or (step := int(np.median(gaps))) <= 0:
        return []
    return [
        time + turn * step
        for time, frames in zip(times, np.round(gaps / step).astype(int).tolist())
        for turn in range(1, frames)
        if frames <= 12
    ]


def ends_within_a_packet(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(512)
    for size, first in TRANSPORT_PACKETS:
        if head[first : first + 1] == head[first + size : first + size + 1] == b"G":
            return path.stat().st_size % size > 0
    return False


def which_damaged(damaged: list[int], count: int) -> str:
    """The numbers of damaged frames, the first few, and what became of them."""
    first = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
    return (
        f"{len(damaged)} of {count} frames are damaged ({first}); the one before a missing one stands in for it, and "
        "those after it may be wrong"
    )
