"""Videos with masks as a source of clips: what the readers of the layouts yield, and the sampling of frames."""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from stm_model.data.augment import random_color, random_view, visible_objects
from stm_model.data.clips import Clip, DrawnClips, clip_of
from stm_model.io import images
from stm_model.io.images import MediaError


class Sequence(NamedTuple):
    """One video of a dataset, as paths in order of time."""

    name: str
    frame_paths: list[Path]
    mask_paths: list[Path | None]
    """The mask of each frame; None where there is none."""

    @property
    def annotated(self) -> list[int]:
        """The frames that have a mask."""
        return [index for index, path in enumerate(self.mask_paths) if path is not None]

    def load(self) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
        """All frames uint8 `[H, W, 3]` and all label maps uint8 `[H, W]`, None where there is no mask."""
        return [images.read_image(path) for path in self.frame_paths], [
            None if path is None else read_labels(path) for path in self.mask_paths
        ]

    def load_pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Frame uint8 `[H, W, 3]` and labels uint8 `[H, W]` of an annotated frame.

        Raises:
            MediaError: a file cannot be read, or the two differ in size.
        """
        mask_path = self.mask_paths[index]
        return same_size(images.read_image(self.frame_paths[index]), read_labels(mask_path), mask_path)


def read_labels(path: Path) -> np.ndarray:
    """Labels of an annotation; DAVIS-2016's 255 is its one object."""
    labels = images.read_mask(path)
    return np.where(labels == 255, 1, labels).astype(np.uint8) if set(np.unique(labels)) <= {0, 255} else labels


def same_size(frame: np.ndarray, labels: np.ndarray, mask_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A frame and its labels; MediaError where they differ in size."""
    if frame.shape[:2] != labels.shape:
        raise MediaError(
            f"{mask_path}: the mask is {images.by(labels.shape)} pixels, its frame {images.by(frame.shape)}"
        )
    return frame, labels


class VideoClips(DrawnClips):
    """Random training clips of a list of sequences."""

    def __init__(
        self,
        sequences: Sequences[Sequence],
        frames: int = 3,
        size: tuple[int, int] = (192, 192),
        max_skip: tuple[int, int] = (8, 8),
        growth: int = 0,
        most_objects: int = 4,
        color: float = 0.3,
        motion: float = 0.3,
    ):
        """
        Args:
            sequences: what to draw from; each with a mask at least.
            frames: T, frames per clip, in the order of the video or in reverse.
            size: height and width of the crop in pixels.
            max_skip: greatest number of video frames from one frame of the clip to the next, at the start of the
                training and once it has grown.
            growth: number of clips over which it grows.
            most_objects: objects of a clip; further ones are left unlabelled.
            color: strength of the change of colours, see `random_color`.
            motion: strength of what is added to the motion of the video, see `random_view`.

        Raises:
            ValueError: there is no sequence, or one has no mask.
        """
        super().__init__(sequences)
        for sequence in sequences:
            if not sequence.annotated:
                raise ValueError(f"sequence {sequence.name}: expected a mask at least, got none")
        self.frames, self.size, self.max_skip, self.growth = frames, size, max_skip, growth
        self.most_objects, self.color, self.motion = most_objects, color, motion

    def draw(self, source: Sequence, seed: int, random: torch.Generator) -> Clip:
        # neighbouring frames too, as a video is tracked: a clip has its own greatest skip
        skip = int(torch.randint(1, self._max_skip(seed) + 1, (), generator=random))
        indices = pick_frames(source.annotated, self.frames, skip, random)
        pairs = {index: source.load_pair(index) for index in set(indices)}
        sizes = {pairs[index][1].shape for index in indices}
        if len(sizes) > 1:
            sizes = " and ".join(images.by(size) for size in sorted(sizes))
            raise MediaError(f"sequence {source.name}: frames differ in size: {sizes} pixels")
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
    """Frames of a clip, in order or, as a video runs both ways, in reverse.

    Args:
        annotated: the frames of the video that have a mask, ascending.
        count: how many to pick. A video with fewer repeats its last.
        max_skip: greatest distance of one to the next, where the annotation is that dense.
        random: source of randomness.
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
