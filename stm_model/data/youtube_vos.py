"""The YouTube-VOS layout: <split>/meta.json, <split>/JPEGImages/<video>/, <split>/Annotations/<video>/; LVOS has the
same without meta.json.

Not every frame has a mask: every fifth in the training split, in the validation split those in which an object enters.
<split>_all_frames/JPEGImages/ holds the frames between.
"""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from stm_model.data.video import ListedObject, Video
from stm_model.io.images import MediaError


def youtube_vos_videos(folder: Path, all_frames: bool = False, only: Collection[str] = ()) -> list[Video]:
    """The videos that meta.json in the folder of a split lists; of those, `only` the named ones, none names all.

    `all_frames` takes frames from `<split>_all_frames` beside it, if there. Raises FileNotFoundError for what is
    missing, ValueError for another meta.json or a mask without a frame.
    """
    meta = read_meta(folder / "meta.json")
    every = folder.with_name(f"{folder.name}_all_frames") / "JPEGImages"
    frames = every if all_frames and every.is_dir() else folder / "JPEGImages"
    return [
        dataclasses.replace(
            Video.find("YouTube-VOS", frames / name, folder / "Annotations" / name), listed_objects=meta[name]
        )
        for name in sorted(meta)
        if not only or name in only
    ]


def lvos_videos(folder: Path, only: Collection[str] = ()) -> list[Video]:
    """The videos of the folder of a split, `only` the named ones, none names all; some of their frames have masks."""
    frames = folder / "JPEGImages"
    if not frames.is_dir():
        raise FileNotFoundError(f"LVOS split: no folder {frames}")
    names = [path.name for path in sorted(frames.iterdir()) if path.is_dir() and (not only or path.name in only)]
    return [Video.find("LVOS", frames / name, folder / "Annotations" / name) for name in names]


def read_meta(path: Path) -> dict[str, dict[int, ListedObject]]:
    """Video → label → object, from a meta.json. Raises MediaError if it is of another kind."""
    if not path.is_file():
        raise FileNotFoundError(f"YouTube-VOS layout: no such file: {path}")
    try:
        videos = json.loads(path.read_text(encoding="utf-8"))["videos"]
        return {
            name: dict(sorted((int(label), _listed(facts)) for label, facts in video["objects"].items()))
            for name, video in videos.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = '{"videos": {name: {"objects": {label: {"frames": [...]}}}}}'
        raise MediaError(f"{path}: expected {form} ({type(error).__name__}: {error})") from error


def _listed(facts: dict[str, Any]) -> ListedObject:
    return ListedObject(tuple(sorted(map(str, facts["frames"]))), facts.get("category"))
