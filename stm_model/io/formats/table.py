"""The formats that label maps are written in, by name, and several of them at once."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from stm_model.io.formats.coco import CocoExport, YoutubeVisExport
from stm_model.io.formats.cvat import CvatExport
from stm_model.io.formats.export import Clip, Export
from stm_model.io.formats.film import MatteExport, ProResExport, WebmAlphaExport, WebmMatteExport
from stm_model.io.formats.labelme import LabelmeExport
from stm_model.io.formats.pictures import AlphaExport, ExrExport, MotsExport, PaletteExport
from stm_model.io.formats.yolo import YoloExport

FORMATS: dict[str, type[Export]] = {
    "png": PaletteExport,
    "coco": CocoExport,
    "ytvis": YoutubeVisExport,
    "mots": MotsExport,
    "cvat": CvatExport,
    "labelme": LabelmeExport,
    "yolo": YoloExport,
    "alpha": AlphaExport,
    "alpha-mov": ProResExport,
    "alpha-webm": WebmAlphaExport,
    "matte": MatteExport,
    "matte-webm": WebmMatteExport,
    "exr": ExrExport,
}


TRACKED = tuple(name for name in FORMATS if name != "png")
"""Those that `stm track` writes beside its masks, which are PNGs."""


def check_formats(names: Collection[str], option: str, known: Collection[str], *, frames: bool = True) -> None:
    """Raise a ValueError that names the option unless these are known and can be written, `frames`: with pixels."""
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {name}: no such format; expected some of {', '.join(known)}")
        export = FORMATS[name]
        if export.needs_frames and not frames:
            raise ValueError(f"{option} {name}: shows the video's own pixels; add --video VIDEO")
        if export.extra and find_spec(export.extra) is None:
            raise ValueError(
                f"{option} {name}: needs {export.extra}, which is not installed: pip install 'stm-kernels[{name}]'"
            )


class Exports:
    """Formats being written to a folder, from the first frame on; a context manager. After an exception too, what
    came before it is whole. The names are those of `FORMATS`; for the other arguments see `Export`.
    """

    def __init__(self, names: Collection[str], out: Path, clip: Clip, keep: Collection[int] = ()):
        self.names, self.out, self.clip, self.keep = dict.fromkeys(names), out, clip, keep
        self._open: list[Export] | None = None

    @property
    def needs_frames(self) -> bool:
        """Whether one of them shows the video's pixels."""
        return any(FORMATS[name].needs_frames for name in self.names)

    @property
    def files(self) -> dict[str, str]:
        """Where each format is, by its name."""
        return {name: str(self.out / FORMATS[name].target) for name in self.names}

    def write(self, index: int, labels: np.ndarray, frame: np.ndarray | None) -> None:
        """Write the next frame's labels uint8 `[H, W]`, to formats that show it with its pixels, uint8 `[H, W, 3]`."""
        if self._open is None:
            self.out.mkdir(parents=True, exist_ok=True)
            self._open = []
            for name in self.names:
                self._open.append(FORMATS[name](self.out, self.clip, self.keep))
        for export in self._open:
            export.write(index, labels, frame)

    def discard(self) -> None:
        """Leave what was there before, as where a run is refused after all."""
        for export in self._open or ():
            export.discard()
        self._open = []

    def __enter__(self) -> Exports:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:
            for export in self._open or ():
                stack.callback(export.close)
