"""What a benchmark asks for: which videos, which masks are given, which are written and which are scored.

davis2016, davis2017   ImageSets/<year>/<split>.txt, JPEGImages/<resolution>/<video>/, Annotations/<resolution>/<video>/
youtube_vos            <split>/meta.json, <split>[_all_frames]/JPEGImages/<video>/, <split>/Annotations/<video>/
lvos                   <split>/JPEGImages/<video>/, <split>/Annotations/<video>/: an object enters where it first
                       appears in an annotation
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stm_model.io import images
from stm_model.io.images import VOID, MediaError

SEEN, UNSEEN = "seen", "unseen"


@dataclass(frozen=True)
class Video:
    """One video of a benchmark. Frames are numbered from 0 in order of time."""

    name: str
    """Name of its folder."""
    frame_paths: tuple[Path, ...]
    """Every frame there is to track through."""
    annotations: Mapping[int, Path]
    """Frame → its annotated labels, where there are any."""
    entries: Mapping[int, tuple[int, ...]]
    """Frame → objects whose first mask is given there."""
    asked: tuple[int, ...]
    """Frames whose masks a submission holds."""
    scored: Mapping[int, tuple[int, ...]]
    """Frame → objects scored there; empty where the ground truth is not public."""
    groups: Mapping[int, str] = field(default_factory=dict)
    """Object → `seen` or `unseen`, where the benchmark tells."""
    attributes: tuple[str, ...] = ()
    """What makes the video hard, in the benchmark's words."""
    single_object: bool = False
    """All annotated objects count as one, label 1, and 0/255 annotations mean it too: DAVIS-2016."""

    @property
    def objects(self) -> tuple[int, ...]:
        """Labels of all objects, in ascending order."""
        return tuple(sorted(label for labels in self.entries.values() for label in labels))

    def read_annotation(self, frame: int) -> np.ndarray:
        """Labels of an annotated frame, uint8 `[H, W]`."""
        return read_annotation(self.annotations[frame], self.single_object)

    def given_masks(self) -> dict[int, np.ndarray]:
        """Frame → the mask given there: labels of the objects that enter, void pixels kept."""
        masks = {}
        for frame, labels in self.entries.items():
            annotation = self.read_annotation(frame)
            masks[frame] = np.where(np.isin(annotation, (*labels, VOID)), annotation, 0).astype(np.uint8)
        return masks

    def is_black_and_white(self) -> bool:
        """Whether its one object is annotated by 255, as DAVIS-2016 is released."""
        return self.single_object and set(np.unique(images.read_mask(self.annotations[0]))) == {0, VOID}

    def mask_name(self, frame: int) -> str:
        """File name of a frame's mask in a submission."""
        return f"{self.frame_paths[frame].stem}.png"


@dataclass(frozen=True)
class Dataset:
    """A split of a benchmark."""

    name: str
    """`davis2016`, `davis2017`, `youtube_vos` or `lvos`."""
    split: str
    """Name of the split."""
    videos: tuple[Video, ...]
    """Its videos."""
    submission_folder: str = ""
    """Folder inside a submission that holds the videos' folders."""


def open_dataset(
    name: str, root: Path, split: str | None = None, resolution: str | None = None, videos: Sequence[str] = ()
) -> Dataset:
    """Find the videos of a split, without reading frames.

    Args:
        name: a key of `LAYOUTS`.
        root: the dataset's folder.
        split: its list or folder; None is `val` for DAVIS, `valid` elsewhere.
        resolution: folder under JPEGImages, DAVIS alone; None takes `480p`, or the only one.
        videos: names of the videos to keep; none keeps all.

    Raises:
        FileNotFoundError: the folder, the split or a video's frames or masks are missing.
        ValueError: frames, annotations and lists contradict each other.
    """
    if name not in LAYOUTS:
        raise ValueError(f"dataset: expected {', '.join(LAYOUTS)}, got {name!r}")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"data: no folder {root}")
    dataset = LAYOUTS[name](Path(root), split, resolution, set(videos))
    missing = sorted(set(videos) - {video.name for video in dataset.videos})
    if missing:
        raise ValueError(f"videos: {', '.join(missing)} not in the split {dataset.split} of {root}")
    if not dataset.videos:
        raise ValueError(f"{name}: the split {dataset.split} of {root} names no video")
    return dataset


def read_annotation(path: Path, single_object: bool) -> np.ndarray:
    """Labels of an annotation; with `single_object` any object is label 1, and so is 255 where nothing else is."""
    labels = images.read_mask(path)
    if not single_object:
        return labels
    if labels[(labels > 0) & (labels < VOID)].size:
        return np.where((labels > 0) & (labels < VOID), 1, labels).astype(np.uint8)
    return (labels > 0).astype(np.uint8)


def _open_davis(root: Path, split: str | None, resolution: str | None, wanted: set[str], year: str) -> Dataset:
    split = split or "val"
    names = root / "ImageSets" / year / f"{split}.txt"
    if not names.is_file():
        raise FileNotFoundError(f"DAVIS split: no such file: {names}")
    resolution = resolution or _only_resolution(root / "JPEGImages")
    attributes = _read_attributes(root)
    videos = []
    for name in names.read_text().split():
        if wanted and name not in wanted:
            continue
        frames = _pictures(root / "JPEGImages" / resolution / name, f"DAVIS video {name}")
        folder = root / "Annotations" / resolution / name
        annotations = _match(frames, _pictures(folder, f"DAVIS video {name}"))
        single = year == "2016"
        if 0 not in annotations:
            raise FileNotFoundError(f"DAVIS video {name}: no annotation of its first frame in {folder}")
        objects = _labels_in(read_annotation(annotations[0], single))
        if not objects:
            raise ValueError(f"{annotations[0]}: expected an object in the first frame, found none")
        # where only the first mask is public, as in test-dev, there is nothing to score
        scored = range(1, len(frames) - 1) if len(annotations) > 1 else ()
        for frame in scored:
            if frame not in annotations:
                raise FileNotFoundError(f"DAVIS video {name}: frame {frames[frame].stem} has no annotation in {folder}")
        everywhere = dict.fromkeys(scored, objects)
        found = attributes.get(name, ())
        asked = tuple(range(len(frames)))
        videos.append(
            Video(name, frames, annotations, {0: objects}, asked, everywhere, attributes=found, single_object=single)
        )
    return Dataset(f"davis{year}", split, tuple(videos))


def _open_youtube_vos(root: Path, split: str | None, resolution: str | None, wanted: set[str]) -> Dataset:
    split = split or "valid"
    _refuse_resolution(resolution)
    meta = _read_meta(root / split / "meta.json")
    every_frame = root / f"{split}_all_frames" / "JPEGImages"
    frames_folder = every_frame if every_frame.is_dir() else root / split / "JPEGImages"
    seen = _seen_categories(root, split)
    videos = [
        _youtube_video(name, meta[name]["objects"], frames_folder / name, root / split / "Annotations" / name, seen)
        for name in sorted(meta)
        if not wanted or name in wanted
    ]
    return Dataset("youtube_vos", split, tuple(videos), "Annotations")


def _youtube_video(name: str, objects: Mapping, frames_folder: Path, masks_folder: Path, seen: set[str]) -> Video:
    frames = _pictures(frames_folder, f"YouTube-VOS video {name}")
    annotations = _match(frames, _pictures(masks_folder, f"YouTube-VOS video {name}"))
    numbers = {path.stem: number for number, path in enumerate(frames)}
    listed: dict[int, list[int]] = {}
    for label, facts in objects.items():
        unknown = [stem for stem in facts["frames"] if stem not in numbers]
        if unknown:
            raise FileNotFoundError(
                f"YouTube-VOS video {name}: meta.json names frame {unknown[0]}, not in {frames_folder}"
            )
        listed[int(label)] = sorted(numbers[stem] for stem in facts["frames"])
    entries: dict[int, tuple[int, ...]] = {}
    for label, where in sorted(listed.items()):
        if not where or where[0] not in annotations:
            first = frames[where[0]].stem if where else "none"
            raise FileNotFoundError(f"YouTube-VOS video {name}: no mask where object {label} enters (frame {first})")
        entries[where[0]] = (*entries.get(where[0], ()), label)
    asked = tuple(sorted({frame for where in listed.values() for frame in where}))
    scored: dict[int, tuple[int, ...]] = {}
    # the validation set publishes the masks of entering objects alone, which are no ground truth for the others
    if all(frame in annotations for frame in asked):
        for label, where in sorted(listed.items()):
            for frame in where[1:]:
                scored[frame] = (*scored.get(frame, ()), label)
    groups = {
        int(label): SEEN if facts["category"] in seen else UNSEEN
        for label, facts in objects.items()
        if seen and "category" in facts
    }
    return Video(name, frames, annotations, dict(sorted(entries.items())), asked, dict(sorted(scored.items())), groups)


def _seen_categories(root: Path, split: str) -> set[str]:
    """The categories of the training split; those that it lacks are the unseen ones."""
    path = root / "train" / "meta.json"
    if split == "train" or not path.is_file():
        return set()
    objects = [facts for video in _read_meta(path).values() for facts in video["objects"].values()]
    return {facts["category"] for facts in objects if "category" in facts}


def _open_lvos(root: Path, split: str | None, resolution: str | None, wanted: set[str]) -> Dataset:
    split = split or "valid"
    _refuse_resolution(resolution)
    folder = root / split / "JPEGImages"
    if not folder.is_dir():
        raise FileNotFoundError(f"LVOS split: no folder {folder}")
    names = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and (not wanted or path.name in wanted)]
    videos = []
    for name in tqdm(names, desc="find objects", unit="video", leave=False, delay=1, disable=None):
        frames = _pictures(folder / name, f"LVOS video {name}")
        annotations = _match(frames, _pictures(root / split / "Annotations" / name, f"LVOS video {name}"))
        entries, scored, known = {}, {}, ()
        for frame in sorted(annotations):
            if known:
                scored[frame] = known
            entering = tuple(sorted(set(_labels_in(images.read_mask(annotations[frame]))) - set(known)))
            if entering:
                entries[frame] = entering
                known = tuple(sorted((*known, *entering)))
        if set(entries) == set(annotations):
            # only where objects enter is there a mask: nothing to score by
            scored = {}
        if not entries:
            raise ValueError(f"LVOS video {name}: no object in {root / split / 'Annotations' / name}")
        videos.append(Video(name, frames, annotations, entries, tuple(range(min(entries), len(frames))), scored))
    return Dataset("lvos", split, tuple(videos), "Annotations")


LAYOUTS: dict[str, Callable[[Path, str | None, str | None, set[str]], Dataset]] = {
    "davis2016": lambda *arguments: _open_davis(*arguments, year="2016"),
    "davis2017": lambda *arguments: _open_davis(*arguments, year="2017"),
    "youtube_vos": _open_youtube_vos,
    "lvos": _open_lvos,
}


def _only_resolution(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*") if path.is_dir())
    if not found:
        raise FileNotFoundError(f"DAVIS layout: no resolution folder under {folder}")
    if "480p" not in found and len(found) > 1:
        raise ValueError(f"DAVIS layout: several resolutions under {folder} ({', '.join(found)}); choose one")
    return "480p" if "480p" in found else found[0]


def _refuse_resolution(resolution: str | None) -> None:
    if resolution is not None:
        raise ValueError(f"resolution: only DAVIS has resolution folders, got {resolution!r}")


def _pictures(folder: Path, owner: str) -> tuple[Path, ...]:
    files = images.picture_files(folder) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"{owner}: no pictures in {folder}")
    return tuple(files)


def _match(frames: Iterable[Path], masks: Iterable[Path]) -> dict[int, Path]:
    """Frame number → the mask of the same name."""
    numbers = {path.stem: number for number, path in enumerate(frames)}
    for path in masks:
        if path.stem not in numbers:
            raise ValueError(f"{path}: there is no frame of this name")
    return {numbers[path.stem]: path for path in masks}


def _labels_in(labels: np.ndarray) -> tuple[int, ...]:
    return tuple(int(label) for label in np.unique(labels) if label not in (0, VOID))


def _read_meta(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"YouTube-VOS layout: no such file: {path}")
    try:
        videos = json.loads(path.read_text())["videos"]
        for video in videos.values():
            for facts in video["objects"].values():
                facts["frames"] = [str(stem) for stem in facts["frames"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = '{"videos": {name: {"objects": {label: {"frames": [...]}}}}}'
        raise MediaError(f"{path}: expected {form} ({type(error).__name__}: {error})") from error
    return videos


def _read_attributes(root: Path) -> dict[str, tuple[str, ...]]:
    """Video → attributes, from DAVIS' db_info.yml where the dataset has it."""
    attributes = {}
    for path in (root / "db_info.yml", root / "db_info.yaml"):
        # of YAML only what this file uses: sequences with a name and a list, in brackets or by dashes, in any order
        for entry in re.split(r"(?m)^\s*-\s+(?=\w+:)", path.read_text())[1:] if path.is_file() else ():
            name = re.search(r"(?m)^\s*name:\s*([\w-]+)", entry)
            listed = re.search(r"attributes:\s*(\[[^\]]*\]|(?:\s*-\s+\w+$)+)", entry, re.MULTILINE)
            if name and listed:
                attributes[name[1]] = tuple(re.findall(r"\w+", listed[1]))
    return attributes
