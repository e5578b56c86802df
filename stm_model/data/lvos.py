"""The LVOS layout: <split>/JPEGImages/<video>/, <split>/Annotations/<video>/."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from stm_model.data.video import Video


def lvos_videos(folder: Path, only: Collection[str] = ()) -> list[Video]:
    """The videos of the folder of a split, `only` the named ones, none names all; some of their frames have masks."""
    frames = folder / "JPEGImages"
    if not frames.is_dir():
        raise FileNotFoundError(f"LVOS split: no folder {frames}")
    names = [path.name for path in sorted(frames.iterdir()) if path.is_dir() and (not only or path.name in only)]
    return [Video.find("LVOS", frames / name, folder / "Annotations" / name) for name in names]
