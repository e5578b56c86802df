"""What a session gives away: its masks in other tools' formats, and the video with its masks in color."""

import shutil
import zipfile
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from stm_model.interactive.footage import Footage
from stm_model.interactive.session import Progress, ScribbleSession
from stm_model.io.formats.export import Clip
from stm_model.io.formats.table import FORMATS, Exports, check_formats
from stm_model.io.images import overlay
from stm_model.io.video import VideoWriter

OVERLAY = "overlay"
"""The video with its masks in color, beside the formats of `FORMATS`."""


def check_results(formats: Collection[str]) -> None:
    """Raise a ValueError unless these can be written."""
    if not formats:
        raise ValueError(f"export: expected some of {OVERLAY}, {', '.join(FORMATS)}, got none")
    check_formats([name for name in formats if name != OVERLAY], "export", FORMATS)


def write_results(
    session: ScribbleSession, footage: Footage, formats: Collection[str], folder: Path, progress: Progress
) -> list[Path]:
    """Write a session's masks to an empty folder, a file for each format; a format of many files is zipped."""
    clip = Clip(footage.name, footage.source, session.names)
    # beside what names them, as they will be for whoever unpacks it
    clip.files = tuple(folder / "labelme" / file.name for file in clip.files)
    exports = Exports([name for name in formats if name != OVERLAY], folder, clip)
    with ExitStack() as stack:
        stack.enter_context(exports)
        video = None
        if OVERLAY in formats:
            video = stack.enter_context(VideoWriter(folder / "overlay.mp4", clip.fps, time_base=clip.time_base))
        for index in range(len(session.frames)):
            labels, frame = session.labels(index), np.asarray(session.frames[index])
            exports.write(index, labels, frame)
            if video is not None:
                video.write(overlay(frame, labels, colors=session.palette), clip.time(index))
            progress(index + 1, len(session.frames))
    return [_as_file(path) for path in sorted(folder.iterdir())]


def _as_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    packed = path.with_suffix(".zip")
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted(path.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(path.parent))
    shutil.rmtree(path)
    return packed
