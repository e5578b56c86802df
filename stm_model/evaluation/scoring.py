"""Score folders of masks against a benchmark's ground truth, frame by frame, in several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stm_model.evaluation.metrics import Statistics, label_scores, statistics
from stm_model.evaluation.protocol import Dataset, Video
from stm_model.io.images import MediaError, width_by_height
from stm_model.io.masks import read_mask
from stm_model.labels import VOID
from stm_model.processes import worker_pool
from stm_model.progress import Progress

CHUNK = 32


class ResultError(MediaError):
    """A result mask that cannot be scored; the message names the file."""


@dataclass(frozen=True)
class ObjectScore:
    """J and F of one object of a video."""

    video: str
    label: int
    group: str | None
    """`seen` or `unseen`, where the benchmark tells."""
    frames: tuple[int, ...]
    region: tuple[float, ...]
    """J of each."""
    contour: tuple[float, ...]
    """F of each."""

    @property
    def region_statistics(self) -> Statistics:
        """Mean, recall and decay of J."""
        return statistics(self.region)

    @property
    def contour_statistics(self) -> Statistics:
        """Mean, recall and decay of F."""
        return statistics(self.contour)


class _Task(NamedTuple):
    """Frames of one video to score."""

    video: Video
    folder: Path | None
    binary: bool
    frames: tuple[int, ...]


def score(
    dataset: Dataset, results: Path | None, *, binary: bool = False, workers: int | None = None
) -> list[ObjectScore]:
    """J and F of every object of a split, by video and label; none for videos without public ground truth.

    Args:
        dataset: the split.
        results: a submission, with a folder of masks for each video. None scores the floor: every given mask repeated.
        binary: the masks are black and white: bright pixels are the one object of a video.
        workers: processes; None takes one a core.

    Raises:
        FileNotFoundError: the folder, a video's or a mask is missing.
        ResultError: a mask has another size than its ground truth, or labels of no object.
    """
    folders = {
        video.name: None if results is None else find_results(dataset, results, video) for video in dataset.videos
    }
    tasks = [
        _Task(video, folders[video.name], binary, frames)
        for video in dataset.videos
        for frames in _chunks(tuple(video.scored))
    ]
    scored: dict[tuple[str, int], list[tuple[int, float, float]]] = {}
    with Progress(desc="score", unit="frame", total=sum(len(task.frames) for task in tasks)) as bar:
        for task, rows in _each(tasks, workers):
            for frame, label, region, contour in rows:
                scored.setdefault((task.video.name, label), []).append((frame, region, contour))
            bar.update(len(task.frames))
    groups = {(video.name, label): group for video in dataset.videos for label, group in video.groups.items()}
    return [
        ObjectScore(*owner, groups.get(owner), *map(tuple, zip(*sorted(rows))))
        for owner, rows in sorted(scored.items())
    ]


def find_results(dataset: Dataset, results: Path, video: Video) -> Path:
    """The folder with the masks of a video.

    Raises:
        FileNotFoundError: there is no such folder, it is empty, or the mask of a scored frame is missing.
    """
    if not results.is_dir():
        raise FileNotFoundError(f"results: no folder {results}")
    if not any(results.iterdir()):
        raise FileNotFoundError(f"results: {results} is empty; expected a folder of masks for each video")
    inner = results / dataset.submission_folder
    folder = (inner if inner.is_dir() else results) / video.name
    if not folder.is_dir():
        raise FileNotFoundError(f"results: no folder {folder} for the video {video.name}")
    for frame in video.scored:
        path = folder / video.mask_name(frame)
        if not path.is_file():
            raise FileNotFoundError(f"results: {path} is missing")
    return folder


def read_result(path: Path, video: Video, size: tuple[int, ...], binary: bool = False) -> np.ndarray:
    """Labels of a result mask of a video, uint8 `[H, W]` of `size`; `binary` takes bright pixels for the one object.

    Raises ResultError for another size, a label of no object, or a black and white mask without `binary`.
    """
    if binary and len(video.objects) > 1:
        raise ResultError(f"{path}: a black-and-white mask can't tell the {len(video.objects)} objects of {video.name}")
    labels = read_mask(path, binary=binary)
    if binary:
        labels = labels * np.uint8(video.objects[0])
    if labels.shape != size:
        raise ResultError(
            f"{path}: {width_by_height(labels.shape)} pixels; expected {width_by_height(size)} like its ground truth"
        )
    found = {int(label) for label in np.unique(labels)} - {0}
    if found == {VOID} and video.black_and_white:
        return (labels > 0).astype(np.uint8)
    if found == {VOID}:
        hint = "; add --binary to take white for the object" if len(video.objects) == 1 else ""
        raise ResultError(f"{path}: black and white (0 and 255); expected labels {_range(video)}{hint}")
    extra = sorted(found - set(video.objects))
    if extra:
        raise ResultError(f"{path}: label {extra[0]} is no object of {video.name}; expected labels {_range(video)}")
    return labels


def _range(video: Video) -> str:
    return f"0, {', '.join(map(str, video.objects))}"


def _chunks(frames: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(frames), CHUNK):
        yield frames[start : start + CHUNK]


def _each(tasks: list[_Task], workers: int | None) -> Iterator[tuple[_Task, list]]:
    # cores that this process may use
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or cores, len(tasks))
    if count <= 1:
        yield from zip(tasks, map(_score_frames, tasks))
        return
    with worker_pool(count) as pool:
        yield from zip(tasks, pool.map(_score_frames, tasks))


def _score_frames(task: _Task) -> list[tuple[int, int, float, float]]:
    """(frame, label, J, F) of every object scored in some frames of a video."""
    video, rows = task.video, []
    repeated = _repeated(task)
    for frame in task.frames:
        truth = video.read_annotation(frame)
        if task.folder is None:
            prediction = next(repeated)
        else:
            prediction = read_result(task.folder / video.mask_name(frame), video, truth.shape, task.binary)
        for label in video.scored[frame]:
            rows.append((frame, label, *label_scores(prediction, truth, label)))
    return rows


def _repeated(task: _Task) -> Iterator[np.ndarray]:
    """For each frame of a task, the masks given so far, later ones on top."""
    given = task.video.given_masks()
    for frame in task.frames:
        labels = np.zeros_like(given[min(given)])
        for entry, mask in given.items():
            if entry <= frame:
                labels = np.where((mask > 0) & (mask < VOID), mask, labels)
        yield labels
