"""A video of a dataset, which the readers of all layouts yield, and training clips cut from videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from stm_model.data.augment import random_color, random_view, visible_objects
from stm_model.data.clips import Clip, DrawnClips, clip_of
from stm_model.io import images
from stm_model.io.images import MediaError
from stm_model.io.masks import read_mask
from stm_model.labels import VOID


class ListedObject(NamedTuple):
    """An object as a dataset's metadata lists it."""

    frame_names: tuple[str, ...]
    """Names of the frames it is annotated in, in order of time; its mask enters in the first."""
    category: str | None = None


@dataclass(frozen=True)
class Video:
    """A video with masks, as paths. Frames are numbered from 0 in order of time."""

    name: str
    """Name of its folder."""
    frame_paths: tuple[Path, ...]
    annotations: Mapping[int, Path]
    """Frame → its mask, where there is one, in ascending order."""
    listed_objects: Mapping[int, ListedObject] = field(default_factory=dict)
    """Label → object, where the dataset has metadata; DAVIS and LVOS have masks only."""
    single_object: bool = False
    """All objects count as one, label 1, as in DAVIS-2016."""

    @classmethod
    def find(cls, layout: str, frames_folder: Path, masks_folder: Path) -> Video:
        """The pictures in two folders named for the video; a mask belongs to the frame of its name."""
        owner = f"{layout} video {frames_folder.name}"
        frames, masks = _pictures(frames_folder, owner), _pictures(masks_folder, owner)
        numbers = {path.stem: number for number, path in enumerate(frames)}
        for path in masks:
            if path.stem not in numbers:
                raise ValueError(f"{path}: there is no frame of this name")
        return cls(frames_folder.name, frames, {numbers[path.stem]: path for path in masks})

    @property
    def annotated(self) -> list[int]:
        """The frames that have a mask."""
        return list(self.annotations)

    @cached_property
    def black_and_white(self) -> bool:
        """Whether 255 marks its one object, as DAVIS-2016 is released: the first mask with anything in it says."""
        for path in self.annotations.values():
            if found := set(np.unique(read_mask(path)).tolist()) - {0}:
                return found == {VOID}
        return False

    def read_annotation(self, frame: int) -> np.ndarray:
        """Labels of an annotated frame, uint8 `[H, W]`; 255 is void."""
        labels = read_mask(self.annotations[frame])
        if self.black_and_white:
            return (labels > 0).astype(np.uint8)
        if self.single_object:
            return np.where((labels > 0) & (labels < VOID), 1, labels).astype(np.uint8)
        return labels

    def load(self) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
        """All frames uint8 `[H, W, 3]` and all label maps uint8 `[H, W]`, None where there is no mask."""
        numbers = range(len(self.frame_paths))
        labels = [self.read_annotation(frame) if frame in self.annotations else None for frame in numbers]
        return [images.read_image(path) for path in self.frame_paths], labels

    def load_pair(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """An annotated frame uint8 `[H, W, 3]` and its labels uint8 `[H, W]`. Raises MediaError where they differ in
        size.
        """
        pixels = images.read_image(self.frame_paths[frame])
        return same_size(pixels, self.read_annotation(frame), self.annotations[frame])


def _pictures(folder: Path, owner: str) -> tuple[Path, ...]:
    files = images.picture_files(folder) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"{owner}: no pictures in {folder}")
    return tuple(files)


def same_size(frame: np.ndarray, labels: np.ndarray, mask_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A frame and its labels; MediaError where they differ in size."""
    if frame.shape[:2] != labels.shape:
        raise MediaError(
            f"{mask_path}: the mask is {images.width_by_height(labels.shape)} pixels, "
            f"its frame {images.width_by_height(frame.shape)}"
        )
    return frame, labels


class VideoClips(DrawnClips):
    """Random training clips of a list of videos."""

    def __init__(
        self,
        videos: Sequence[Video],
        *,
        max_skip: tuple[int, int] = (8, 8),
        growth: int = 0,
        motion: float = 0.3,
        **options: Any,
    ):
        """
        Args:
            videos: what to draw from, in the order of the video or in reverse; each with a mask at least.
            max_skip: greatest number of video frames from one frame of the clip to the next, at the start of the
                training and once it has grown.
            growth: number of clips over which it grows.
            motion: strength of what is added to the motion of the video, see `random_view`.
            options: see `DrawnClips`.

        Raises:
            ValueError: there is no video, or one has no mask.
        """
        super().__init__(videos, **options)
        for video in videos:
            if not video.annotations:
                raise ValueError(f"video {video.name}: expected a mask at least, got none")
        self.max_skip, self.growth, self.motion = max_skip, growth, motion

    def draw(self, source: Video, seed: int, random: torch.Generator) -> Clip:
        # neighbouring frames too, as a video is tracked: a clip has its own greatest skip
        skip = int(torch.randint(1, self._max_skip(seed) + 1, (), generator=random))
        indices = pick_frames(source.annotated, self.frames, skip, random)
        pairs = {index: source.load_pair(index) for index in set(indices)}
        sizes = {pairs[index][1].shape for index in indices}
        if len(sizes) > 1:
            found = " and ".join(images.width_by_height(size) for size in sorted(sizes))
            raise MediaError(f"video {source.name}: frames differ in size: {found} pixels")
        clip = clip_of(*zip(*(pairs[index] for index in indices), strict=True))
        clip = random_view(clip.frames, clip.labels, self.size, random, jitter=self.motion, bend=self.motion)
        clip = Clip(random_color(clip.frames, random, self.color), clip.labels)
        return visible_objects(clip, most=self.most_objects)

    def _max_skip(self, seed: int) -> int:
        """Seeds count clips from a multiple of 2^32, so that a seed knows how far the training is."""
        first, last = self.max_skip
        grown = min(1.0, (seed % 2**32) / self.growth) if self.growth else 1.0
        return round(first + (last - first) * grown)


def pick_frames(annotated: list[int], count: int, max_skip: int, random: torch.Generator) -> list[int]:
    """Frames of a clip among those annotated, ascending, in order or, as a video runs both ways, in reverse.

    `max_skip` is the greatest distance of one to the next, where the annotation is that dense; a video with fewer than
    `count` frames repeats its last.
    """
    position = int(torch.randint(max(1, len(annotated) - count + 1), (), generator=random))
    picked = [annotated[min(position, len(annotated) - 1)]]
    for left in range(count - 1, 0, -1):
        # those near enough that also leave a frame for each of the rest; at least the next one
        near = [
            later
            for later in range(position + 1, max(position + 2, len(annotated) - left + 1))
            if later == position + 1 or annotated[min(later, len(annotated) - 1)] - picked[-1] <= max_skip
        ]
        position = near[int(torch.randint(len(near), (), generator=random))]
        picked.append(annotated[min(position, len(annotated) - 1)])
    return picked[::-1] if torch.rand((), generator=random) < 0.5 else picked
