"""Formats that are videos: with an alpha channel, or black and white."""

from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

import numpy as np

from stm_model.io.formats.export import Clip, Export
from stm_model.io.formats.pictures import cut_out, with_alpha
from stm_model.io.video import Encoding, VideoWriter

VP9 = {"b": "0", "deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0", "threads": "1"}
"""FFmpeg's options of libvpx for a constant quality in little time; with alternative frames it stores no alpha."""


class _Film(Export):
    """A video file with a picture for each label map, at the frames' times: white on the objects, else black; or where
    it needs frames, these with alpha.
    """

    encoding: ClassVar[Encoding]

    def __init__(self, out: Path, clip: Clip, keep: Collection[int] = ()):
        super().__init__(out, clip, keep)
        self._writer = VideoWriter(self.path, clip.fps, self.encoding, clip.time_base)

    def write(self, index: int, labels: np.ndarray, frame: np.ndarray | None) -> None:
        picture = with_alpha(frame, labels) if self.needs_frames and frame is not None else cut_out(labels)
        self._writer.write(picture, self.clip.time(index))

    def close(self) -> None:
        self._writer.close()

    def discard(self) -> None:
        self._writer.discard()


class ProResExport(_Film):
    """ProRes 4444 with alpha: the video, transparent where no object is."""

    target, needs_frames = "alpha.mov", True
    encoding = Encoding("prores_aw", {"profile": "4", "vendor": "apl0"}, "rgba", "yuva444p10le")


class WebmAlphaExport(_Film):
    """VP9 with alpha in WebM, for browsers."""

    target, needs_frames = "alpha.webm", True
    encoding = Encoding("libvpx-vp9", VP9 | {"crf": "20"}, "rgba", "yuva420p")


class MatteExport(_Film):
    """H.264 in mp4: white on the objects, else black."""

    target, encoding = "matte.mp4", Encoding("libx264", {"crf": "10", "preset": "veryfast"}, "gray")


class WebmMatteExport(_Film):
    """VP9 in WebM: white on the objects, else black."""

    target, encoding = "matte.webm", Encoding("libvpx-vp9", VP9 | {"crf": "10"}, "gray")
