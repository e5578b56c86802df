"""The LVOS layout: <split>/JPEGImages/<video>/, <split>/Annotations/<video>/."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from stm_model.data.video import Video


def lvos_videos(folder: Path, only: Collection[str] = ()) -> list[Video]:
    """The videos of a split; some of their frames have masks.

    Args:
        folder: the folder of a split.
        only: names of the videos to find; none finds all.

    Raises:
        FileNotFoundError: the folder, or the frames or masks of a video are missing.
        ValueError: a mask has no frame.
    """
    frames = folder / "JPEGImages"
    if not frames.is_dir():
        raise FileNotFoundError(f"LVOS split: no folder {frames}")
    names = [path.name for path in sorted(frames.iterdir()) if path.is_dir() and (not only or path.name in only)]
    return [Video.find("LVOS", frames / name, folder / "Annotations" / name) for name in names]
