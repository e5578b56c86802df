"""Video in and out: files through FFmpeg, and folders of frames."""

from __future__ import annotations

import collections
import itertools
import math
import os
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from stm_model.io.damage import Break, BrokenVideo, Clock, ends_within_a_packet, lost_times, which_damaged
from stm_model.io.images import MediaError, reason, width_by_height
from stm_model.io.pictures import FOLDER_FPS, Animation, FrameFolder, Source, is_animation
from stm_model.io.sound import Sound
from stm_model.runtime import is_out_of_memory

ONE_FRAME_A_PACKET = frozenset({"h264", "hevc", "av1", "vp9", "mpeg2video", "mjpeg", "prores", "ffv1"})
"""Codecs of which a packet without a frame is damage; others store some frames that are never shown."""
INDEXED = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
"""Containers in which a frame can be sought by when it is shown, by FFmpeg's names."""
TIMED = INDEXED | {"mpegts", "flv"}
"""Containers that say when each frame is shown."""


def open_video(path: str | os.PathLike) -> Video:
    """Open a video file or a folder of frames, without reading it into memory.

    Args:
        path: a file that FFmpeg reads (mp4, mkv, webm, avi, …), an animated WebP or GIF, or a folder of pictures, taken
            in natural order (`frame2` before `frame10`).

    Returns:
        A source. Iterating yields uint8 RGB `[H, W, 3]` frames, from the start each time. It has `path`, `name`,
        `size` (H, W) in pixels, `fps` (Fraction, frames a second; 24 for a folder) and `frame_count` (None if unknown);
        `frames(numbers)` yields some of them, and `place` finds the frame of a number or a time.

    Raises:
        MediaError: nothing there, not a video, no frames, or frames of different sizes in a folder.
        BrokenVideo: while iterating, after the last frame of a video that breaks off or has damaged frames. In place
            of a missing frame comes the one before it, so that those after it keep their numbers.
    """
    path = Path(path)
    if path.is_dir():
        return FrameFolder(path)
    if not path.exists():
        raise MediaError(f"{path}: no such video file or folder of frames")
    if path.is_fifo():
        raise MediaError(
            f"{path}: is a pipe, which is read only once; expected a video file or a folder of "
            "frames, or - for a video on stdin"
        )
    return Animation(path) if is_animation(path) else VideoFile(path)


class VideoFile(Source):
    """A video file read through FFmpeg; see `open_video`. Rotation noted in the file is applied."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.stem
        with self._opened() as (container, stream):
            self.fps = Fraction(stream.average_rate or stream.guessed_rate or FOLDER_FPS)
            self.frame_count = stream.frames or None
            self._timed = container.format.name in TIMED
            self.time_base = stream.time_base if self._timed else 1 / self.fps
        # some containers (mkv, webm) do not say how many frames they hold: count them without decoding
        self._lost: list[int] = []
        self.times: list[int] = []
        """When each frame is shown, in units of `time_base`, the first at 0; noted while they are read, as far as the
        file says it."""
        self.frame_count = self.frame_count or self._count_packets()
        first = next(self._decoded(), None)
        if first is None:
            raise MediaError(f"{path}: no frame in it can be decoded")
        self.size = first[0].shape[:2]

    def frames(self, numbers: range) -> Iterator[np.ndarray]:
        count, damaged = 0, []
        self.times, start = [], None
        frames = self._sought(numbers[0]) if numbers[0] else None
        if frames is not None:
            count, start = numbers[0], self._shown[0]
            self.times = [time - start for time in self._shown[:count]]
        try:
            for frame, whole, time in frames or self._decoded():
                if frame.shape[:2] != self.size:
                    sizes = f"{width_by_height(self.size)} to {width_by_height(frame.shape)}"
                    raise Break(f"its frames change from {sizes} pixels")
                if not whole:
                    damaged.append(count)
                if time is not None and len(self.times) == count:
                    start = time if start is None else start
                    self.times.append(time - start)
                if count in numbers:
                    yield frame
                count += 1
                if count > numbers[-1]:
                    break
        except Break as stop:
            known = f" of {self.frame_count}" if (self.frame_count or 0) > count else ""
            also = f"; {which_damaged(damaged, count)}" if damaged else ""
            message = f"{self.path}: the video breaks off after {count}{known} frames ({stop}){also}"
            raise BrokenVideo(message, count) from stop
        if damaged:
            raise BrokenVideo(f"{self.path}: {which_damaged(damaged, count)}", count)

    def frames_from(self, start: int) -> Iterator[np.ndarray]:
        """The frames from number `start` on, as iterating gives them, without a word on damage."""
        with suppress(Break):
            yield from (frame for frame, _, _ in self._sought(start) or itertools.islice(self._decoded(), start, None))

    def _sought(self, start: int) -> Iterator[tuple[np.ndarray, bool, int | None]] | None:
        """What is decoded from a frame on; None where that frame cannot be sought, or is damaged."""
        if start >= len(self._shown):
            return None
        time = self._shown[start]
        frames = itertools.dropwhile(lambda each: each[2] is None or each[2] < time, self._decoded(time))
        with suppress(Break):
            first = next(frames, None)
            if first is not None and first[2] == time:
                return itertools.chain([first], frames)
        return None

    @cached_property
    def _shown(self) -> list[int]:
        """The time stamp of each frame that comes out, in order; empty where they are not known without decoding, or
        cannot be sought.
        """
        with self._opened() as (container, stream):
            if container.format.name not in INDEXED or stream.codec.name not in ONE_FRAME_A_PACKET:
                return []
            try:
                packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
            except (av.error.FFmpegError, OSError):
                return []
        times = [packet.pts for packet in packets]
        _, _, first = next(self._decoded())
        return [] if None in (*times, first) else sorted(time for time in times if time >= first)

    def place(self, at: int | Fraction) -> int:
        """The number of a frame by itself, or of the first that is shown from so many seconds on."""
        if not isinstance(at, Fraction):
            return at
        times = self._shown
        if not times and self._timed:
            # only decoding tells
            with suppress(BrokenVideo):
                collections.deque(self, maxlen=0)
            times = self.times
        return bisect_left(times, times[0] + at / self.time_base) if times else math.ceil(at * self.fps)

    @contextmanager
    def _opened(self):
        try:
            # FFmpeg takes what a relative path has before a colon for a protocol
            container = av.open(os.path.abspath(self.path))
        except (av.error.FFmpegError, OSError) as error:
            if is_out_of_memory(error):
                raise MemoryError(reason(error)) from error
            raise MediaError(f"{self.path}: does not open as a video ({reason(error)})") from error
        with container:
            if not container.streams.video:
                raise MediaError(f"{self.path}: holds no video stream")
            yield container, container.streams.video[0]

    def _count_packets(self) -> int | None:
        with self._opened() as (container, stream):
            try:
                times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
            except (av.error.FFmpegError, OSError):
                return None
            if container.format.name == "mpegts":
                self._lost = lost_times([time for time in times if time is not None])
            return len(times) + len(self._lost) or None

    def _decoded(self, sought: int | None = None) -> Iterator[tuple[np.ndarray, bool, int | None]]:
        """Every frame, whether it is whole and when it is shown, the one before in place of a missing one; `Break`
        where the rest cannot be decoded. With a time stamp that is `sought`, from some frame before it on.
        """
        picture: np.ndarray | None = None
        failure: Exception | None = None
        with self._opened() as (container, stream):
            stream.thread_type = "SLICE"  # frame threads report damage late, after pictures that follow it
            if sought is not None:
                container.seek(sought, stream=stream)
            packets = container.demux(stream)
            clock = Clock(container, stream, self.fps)
            if sought is not None:
                clock.skip(self._shown[0] * stream.time_base)
            # time stamps of frames that have not come out yet
            due = set(self._lost)
            while True:
                packet = None
                try:
                    if (packet := next(packets, None)) is None:
                        break
                    clock.see(packet)
                    shown = packet.size and packet.pts is not None and not packet.is_discard
                    if self._timed and shown and stream.codec.name in ONE_FRAME_A_PACKET:
                        due.add(packet.pts)
                    frames = packet.decode()
                except (av.error.FFmpegError, OSError) as error:
                    if is_out_of_memory(error):
                        raise MemoryError(reason(error)) from error
                    if picture is None:  # a video cut out of a longer one may start with frames that need earlier ones
                        continue
                    if packet is None or packet.pts is None or not self._timed:
                        raise Break(reason(error)) from error
                    failure, frames = error, []
                    due.add(packet.pts)
                for frame in frames:
                    earlier = {time for time in due if frame.pts is not None and time < frame.pts}
                    if picture is not None:
                        yield from ((picture, False, time) for time in sorted(earlier))
                    due -= earlier | {frame.pts}
                    picture = upright(frame)
                    yield picture, not frame.is_corrupt, frame.pts if self._timed else None
            if picture is not None and due:
                raise Break("the rest cannot be decoded" if failure is None else reason(failure)) from failure
            if picture is not None and (shortfall := clock.shortfall()):
                raise Break(shortfall)
            if container.format.name == "mpegts" and ends_within_a_packet(self.path):
                raise Break("the file ends within a packet")


Video = VideoFile | FrameFolder | Animation
"""What `open_video` opens."""


def upright(frame) -> np.ndarray:
    """A decoded frame as uint8 RGB `[H, W, 3]`, turned as it says."""
    pixels = frame.to_ndarray(format="rgb24")
    quarters = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


class Encoding(NamedTuple):
    """How a video file stores pictures."""

    codec: str
    """FFmpeg's name of an encoder."""
    options: dict[str, str]
    """Of the encoder."""
    given: str = "rgb24"
    """Pixel format of the pictures."""
    stored: str = "yuv420p"
    """Pixel format in the file."""


class VideoWriter:
    """Writes uint8 RGB `[H, W, 3]` frames as an H.264 mp4 (MPEG-4 where there is no x264); a context manager.

    The file gets its name when it is closed, after an exception too, so that what was written stays watchable; without
    a frame there is no file. An odd side grows by one repeated row or column.

    Args:
        path: where the mp4 goes.
        fps: frames a second.
        codec: FFmpeg's name of an encoder; None chooses. An `Encoding` also says what frames are like, and the path's
            suffix what the file is.
        time_base: unit in seconds of the times of frames; None is a frame's duration.
        sound: video file whose first sound track is copied, as far as the frames go; left out with a warning if an mp4
            cannot hold it.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: Fraction | float = FOLDER_FPS,
        codec: str | Encoding | None = None,
        time_base: Fraction | None = None,
        sound: str | os.PathLike | None = None,
    ):
        self.path, self._sound_of = Path(path), sound
        self._fps = Fraction(fps).limit_denominator(1001)
        self._format = None if isinstance(codec, Encoding) else "mp4"
        codec = codec or ("libx264" if "libx264" in av.codecs_available else "mpeg4")
        if isinstance(codec, str):
            x264 = codec == "libx264"
            codec = Encoding(codec, {"crf": "20", "preset": "veryfast"} if x264 else {"b": "8000000"})
        self._encoding = codec
        self._partial = self.path.with_name(f".{self.path.stem}.partial{self.path.suffix}")
        self._time_base = time_base or 1 / self._fps
        self._start = 0
        self._last: int | None = None
        self._container: Any = None
        self._stream: Any = None
        self._sound: Sound | None = None

    def write(self, frame: np.ndarray, time: int | None = None) -> None:
        """Append one frame; all have the size of the first. `time` is when it is shown in the video it is of, where the
        first one's starts this one and its sound; None is a frame's duration after the one before.
        """
        height, width = frame.shape[:2]
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0))[: frame.ndim], mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=self._encoding.given)
        if self._last is None:
            self._start, self._last = time or 0, 0
        elif time is None:
            self._last += max(1, round(1 / (self._fps * self._time_base)))
        else:
            # an encoder takes no two frames of one time
            self._last = max(time - self._start, self._last + 1)
        picture.pts, picture.time_base = self._last, self._time_base
        with self._named():
            if self._container is None:
                self._open(frame)
            self._container.mux(self._stream.encode(picture))

    def _open(self, frame: np.ndarray) -> None:
        codec, options, _, stored = self._encoding
        self._container = av.open(os.path.abspath(self._partial), "w", format=self._format)
        self._stream = self._container.add_stream(codec, rate=self._fps, options=options)
        self._stream.height, self._stream.width = frame.shape[:2]
        self._stream.pix_fmt = stored
        self._stream.codec_context.time_base = self._time_base
        self._sound = Sound(self._sound_of, self._container) if self._sound_of is not None else None

    def close(self) -> None:
        """Finish the file. Closing twice is fine."""
        if self._container is None:
            return
        container, self._container = self._container, None
        try:
            with self._named():
                container.mux(self._stream.encode())
                if self._sound is not None and self._last is not None:
                    start = self._start * self._time_base
                    self._sound.copy(start, start + self._last * self._time_base + 1 / self._fps)
                container.close()
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)

    @contextmanager
    def _named(self):
        """An OSError, as on a full disk, names the file as it was asked for."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def discard(self) -> None:
        """Leave no file, and what was there before as it is."""
        if self._container is not None:
            container, self._container = self._container, None
            container.close()
            if self._sound is not None:
                self._sound.close()
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
