"""Formats that are videos: with an alpha channel, or black and white."""

from __future__ import annotations

import os
from collections.abc import Collection
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np

from stm_model.io.formats.export import Clip, Export
from stm_model.io.formats.pictures import cut_out, with_alpha

VP9 = {"b": "0", "deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0", "threads": "1"}
"""FFmpeg's options of libvpx for a constant quality in little time; with alternative frames it stores no alpha."""


class _Film(Export):
    """A video file of what `picture` makes of each label map, at the frames' times; an odd side grows by one repeated
    row or column.
    """

    codec: ClassVar[str]
    given: ClassVar[str] = "gray"
    """Pixel format of the pictures."""
    stored: ClassVar[str] = "yuv420p"
    """Pixel format in the file."""
    options: ClassVar[dict[str, str]]

    def __init__(self, out: Path, clip: Clip, keep: Collection[int] = ()):
        super().__init__(out, clip, keep)
        self._partial = self.path.with_name(f".{self.path.stem}.partial{self.path.suffix}")
        self._container: Any = None
        self._stream: Any = None
        self._start: int | None = None
        self._last = -1

    def write(self, index: int, labels: np.ndarray, frame: np.ndarray | None) -> None:
        picture = self.picture(labels, frame)
        # encoders want even sides
        sides = ((0, picture.shape[0] % 2), (0, picture.shape[1] % 2), (0, 0))
        picture = np.pad(picture, sides[: picture.ndim], mode="edge")
        if self._container is None:
            self._open(*picture.shape[:2])
        encoded = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=self.given)
        time = self.clip.time(index)
        self._start = time if self._start is None else self._start
        self._last = max(time - self._start, self._last + 1)
        encoded.pts, encoded.time_base = self._last, self.clip.time_base
        self._container.mux(self._stream.encode(encoded))

    def picture(self, labels: np.ndarray, frame: np.ndarray | None) -> np.ndarray:
        """What is shown for a frame."""
        return cut_out(labels)

    def _open(self, height: int, width: int) -> None:
        self._container = av.open(os.path.abspath(self._partial), "w")
        rate = Fraction(self.clip.fps).limit_denominator(1001)
        self._stream = self._container.add_stream(self.codec, rate=rate, options=self.options)
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = self.stored
        self._stream.codec_context.time_base = self.clip.time_base

    def close(self) -> None:
        if self._container is not None:
            container, self._container = self._container, None
            try:
                container.mux(self._stream.encode())
                container.close()
                self._partial.replace(self.path)
            finally:
                self._partial.unlink(missing_ok=True)

    def discard(self) -> None:
        if self._container is not None:
            container, self._container = self._container, None
            container.close()
            self._partial.unlink(missing_ok=True)


class _AlphaFilm(_Film):
    needs_frames, given = True, "rgba"

    def picture(self, labels: np.ndarray, frame: np.ndarray | None) -> np.ndarray:
        assert frame is not None
        return with_alpha(frame, labels)


class ProResExport(_AlphaFilm):
    """ProRes 4444 with alpha: the video, transparent where no object is."""

    target, codec, stored = "alpha.mov", "prores_aw", "yuva444p10le"
    options = {"profile": "4", "vendor": "apl0"}


class WebmAlphaExport(_AlphaFilm):
    """VP9 with alpha in WebM, for browsers."""

    target, codec, stored = "alpha.webm", "libvpx-vp9", "yuva420p"
    options = VP9 | {"crf": "20"}


class MatteExport(_Film):
    """H.264 in mp4: white on the objects, else black."""

    target, codec = "matte.mp4", "libx264"
    options = {"crf": "10", "preset": "veryfast"}


class WebmMatteExport(_Film):
    """VP9 in WebM: white on the objects, else black."""

    target, codec = "matte.webm", "libvpx-vp9"
    options = VP9 | {"crf": "10"}
