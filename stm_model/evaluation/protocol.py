"""What a benchmark gives, asks for and scores.

davis2016, davis2017   the first mask is given; every frame is asked for; all but the first and the last are scored
youtube_vos            an object's first mask is given; the frames that meta.json lists are asked for; an object is
                       scored in those after its first
lvos                   an object's first mask is given; every frame is asked for; annotated frames after it are scored
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stm_model.data import video as data
from stm_model.data.davis import Year, davis_videos
from stm_model.data.youtube_vos import lvos_videos, read_meta, youtube_vos_videos
from stm_model.labels import VOID, objects_in
from stm_model.progress import Progress

SEEN, UNSEEN = "seen", "unseen"


@dataclass(frozen=True)
class Video(data.Video):
    """A video of a benchmark."""

    entries: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Frame → objects whose first mask is given there."""
    asked: tuple[int, ...] = ()
    """Frames whose masks a submission holds."""
    scored: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Frame → objects scored there; empty where the ground truth is not public."""
    groups: Mapping[int, str] = field(default_factory=dict)
    """Object → `seen` or `unseen`, where the benchmark tells."""
    corrected: tuple[int, ...] = ()
    """Frames whose true masks are given as well, of all objects, as a user corrects what went wrong."""

    @property
    def objects(self) -> tuple[int, ...]:
        """Labels of all objects, in ascending order."""
        return tuple(sorted(label for labels in self.entries.values() for label in labels))

    def given_masks(self) -> dict[int, np.ndarray]:
        """Frame → the mask given there: labels of the objects that enter, void pixels kept."""
        masks = {}
        for frame, labels in self.entries.items():
            annotation = self.read_annotation(frame)
            masks[frame] = np.where(np.isin(annotation, (*labels, VOID)), annotation, 0).astype(np.uint8)
        return masks | {frame: self.read_annotation(frame) for frame in self.corrected}

    def mask_name(self, frame: int) -> str:
        """File name of a frame's mask in a submission."""
        return f"{self.frame_paths[frame].stem}.png"


@dataclass(frozen=True)
class Dataset:
    """A split of a benchmark."""

    name: str
    """`davis2016`, `davis2017`, `youtube_vos` or `lvos`."""
    split: str
    videos: tuple[Video, ...]
    submission_folder: str = ""
    """Folder inside a submission that holds the videos' folders."""


def open_dataset(
    name: str, root: Path, split: str | None = None, resolution: str | None = None, videos: Sequence[str] = ()
) -> Dataset:
    """Find the videos of a split and what its protocol asks for, without reading frames.

    `split` None is `val` for DAVIS, `valid` elsewhere; `resolution` is DAVIS' folder, None `480p` or the only one;
    `videos` are the names to keep, none keeps all. Raises FileNotFoundError for what is missing, ValueError for
    contradictions.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"dataset: expected {', '.join(BENCHMARKS)}, got {name!r}")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"data: no folder {root}")
    on_davis = name.startswith("davis")
    if resolution is not None and not on_davis:
        raise ValueError(f"resolution: only DAVIS has resolution folders, got {resolution!r}")
    split = split or ("val" if on_davis else "valid")
    found = BENCHMARKS[name](root, split, resolution, set(videos))
    missing = sorted(set(videos) - {video.name for video in found})
    if missing:
        raise ValueError(f"videos: {', '.join(missing)} not in the split {split} of {root}")
    if not found:
        raise ValueError(f"{name}: the split {split} of {root} names no video")
    return Dataset(name, split, tuple(found), "" if on_davis else "Annotations")


def _video(found: data.Video, **protocol: Any) -> Video:
    known = {name.name: getattr(found, name.name) for name in fields(found)}
    return Video(**known | protocol)


def _open_davis(year: Year, root: Path, split: str, resolution: str | None, only: set[str]) -> list[Video]:
    return [
        _davis_video(_video(found, single_object=year == "2016"))
        for found in davis_videos(root, split, resolution, year=year, only=only, first_mask_suffices=True)
    ]


def _davis_video(video: Video) -> Video:
    objects = tuple(sorted(objects_in(video.read_annotation(0))))
    if not objects:
        raise ValueError(f"{video.annotations[0]}: expected an object in the first frame, found none")
    count = len(video.frame_paths)
    scored = range(1, count - 1) if len(video.annotations) > 1 else ()
    return _video(video, entries={0: objects}, asked=tuple(range(count)), scored=dict.fromkeys(scored, objects))


def _open_youtube_vos(root: Path, split: str, resolution: str | None, only: set[str]) -> list[Video]:
    videos = youtube_vos_videos(root / split, all_frames=True, only=only)
    # the categories that the training split lacks are the unseen ones
    meta = root / "train" / "meta.json"
    training = read_meta(meta) if split != "train" and meta.is_file() else {}
    seen = {listed.category for objects in training.values() for listed in objects.values()} - {None}
    return [_youtube_video(video, seen) for video in videos]


def _youtube_video(video: data.Video, seen: set[str | None]) -> Video:
    numbers = {path.stem: number for number, path in enumerate(video.frame_paths)}
    entries: dict[int, tuple[int, ...]] = {}
    later: dict[int, tuple[int, ...]] = {}
    for label, listed in video.listed_objects.items():
        for stem in listed.frame_names:
            if stem not in numbers:
                folder = video.frame_paths[0].parent
                raise FileNotFoundError(
                    f"YouTube-VOS video {video.name}: meta.json names frame {stem}, not in {folder}"
                )
        frames = [numbers[stem] for stem in listed.frame_names]
        if not frames or frames[0] not in video.annotations:
            first = listed.frame_names[0] if frames else "none"
            raise FileNotFoundError(
                f"YouTube-VOS video {video.name}: no mask where object {label} enters (frame {first})"
            )
        entries[frames[0]] = (*entries.get(frames[0], ()), label)
        for frame in frames[1:]:
            later[frame] = (*later.get(frame, ()), label)
    asked = tuple(sorted({*entries, *later}))
    # the validation split publishes only the masks of entering objects, which are no ground truth for the others
    public = all(frame in video.annotations for frame in asked)
    groups = {
        label: SEEN if listed.category in seen else UNSEEN
        for label, listed in video.listed_objects.items()
        if seen and listed.category is not None
    }
    scored = dict(sorted(later.items())) if public else {}
    return _video(video, entries=dict(sorted(entries.items())), asked=asked, scored=scored, groups=groups)


def _open_lvos(root: Path, split: str, resolution: str | None, only: set[str]) -> list[Video]:
    videos = lvos_videos(root / split, only)
    progress = Progress(videos, desc="find objects", unit="video", leave=False)
    return [_lvos_video(video) for video in progress]


def _lvos_video(video: data.Video) -> Video:
    """An object enters where it first appears in a mask."""
    entries: dict[int, tuple[int, ...]] = {}
    scored: dict[int, tuple[int, ...]] = {}
    known: tuple[int, ...] = ()
    for frame in video.annotated:
        if known:
            scored[frame] = known
        if entering := tuple(sorted(objects_in(video.read_annotation(frame)) - set(known))):
            entries[frame] = entering
            known = tuple(sorted((*known, *entering)))
    if not entries:
        raise ValueError(f"LVOS video {video.name}: no object in {video.annotations[video.annotated[0]].parent}")
    # masks only where objects enter are the given ones: there is nothing to score by
    if set(entries) == set(video.annotations):
        scored = {}
    return _video(video, entries=entries, asked=tuple(range(min(entries), len(video.frame_paths))), scored=scored)


BENCHMARKS: dict[str, Callable[[Path, str, str | None, set[str]], list[Video]]] = {
    "davis2016": partial(_open_davis, "2016"),
    "davis2017": partial(_open_davis, "2017"),
    "youtube_vos": _open_youtube_vos,
    "lvos": _open_lvos,
}
"""What opens each benchmark."""
