"""Folders in the DAVIS layout: JPEGImages/<resolution>/<sequence>/, Annotations/<resolution>/<sequence>/, ImageSets."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from stm_model import pictures
from stm_model.data.augment import paste_objects, random_color, random_view, visible_objects
from stm_model.data.clips import Clip


class Sequence(NamedTuple):
    """One video of a dataset, as paths in order of time."""

    name: str
    frame_paths: list[Path]
    mask_paths: list[Path]

    def load(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """All frames uint8 `[H, W, 3]` and all label maps uint8 `[H, W]`."""
        return [pictures.read_image(path) for path in self.frame_paths], [
            _read_labels(path) for path in self.mask_paths
        ]


def davis_sequences(root: str | Path, split: str, resolution: str | None = None) -> list[Sequence]:
    """The sequences a split names.

    Args:
        root: the dataset's folder.
        split: name of a list under ImageSets/2016 or ImageSets/2017, without `.txt`.
        resolution: folder under JPEGImages; None takes the only one, or `480p`.

    Raises:
        FileNotFoundError: a folder, list or sequence is missing.
        ValueError: frames and masks of a sequence differ in number.
    """
    root = Path(root)
    lists = [path for year in ("2016", "2017") if (path := root / "ImageSets" / year / f"{split}.txt").is_file()]
    if not lists:
        raise FileNotFoundError(f"DAVIS split: no {split}.txt under {root / 'ImageSets'}")
    resolution = resolution or _only_resolution(root)
    return [_find_sequence(root, resolution, name) for name in lists[0].read_text().split()]


def _only_resolution(root: Path) -> str:
    found = sorted(path.name for path in (root / "JPEGImages").glob("*") if path.is_dir())
    if not found:
        raise FileNotFoundError(f"DAVIS layout: no resolution folder under {root / 'JPEGImages'}")
    return "480p" if "480p" in found else found[0]


def _find_sequence(root: Path, resolution: str, name: str) -> Sequence:
    frames = sorted((root / "JPEGImages" / resolution / name).glob("*.jpg"))
    masks = sorted((root / "Annotations" / resolution / name).glob("*.png"))
    if not frames:
        raise FileNotFoundError(f"DAVIS sequence {name}: no frames under {root / 'JPEGImages' / resolution / name}")
    if len(frames) != len(masks):
        raise ValueError(f"DAVIS sequence {name}: {len(frames)} frames but {len(masks)} masks")
    return Sequence(name, frames, masks)


def _read_labels(path: Path) -> np.ndarray:
    """Labels of an annotation; DAVIS-2016's 255 is its one object."""
    labels = pictures.read_mask(path)
    return np.where(labels == 255, 1, labels).astype(np.uint8) if set(np.unique(labels)) <= {0, 255} else labels


class DavisClips(torch.utils.data.Dataset):
    """Random training clips of a list of sequences; item i is drawn from seed i."""

    def __init__(
        self,
        sequences: list[Sequence],
        frames: int = 3,
        size: tuple[int, int] = (192, 192),
        max_skip: int = 8,
        still: float = 0.3,
        paste: float = 0.4,
    ):
        """
        Args:
            sequences: what to draw from.
            frames: T, frames per clip, in the order of the video.
            size: height and width of the crop in pixels.
            max_skip: greatest number of video frames from one frame of the clip to the next.
            still: share of clips made from one frame by random motion.
            paste: share of clips with the objects of another clip pasted in.
        """
        self.sequences, self.frames, self.size, self.max_skip = sequences, frames, size, max_skip
        self.still, self.paste = still, paste

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, seed: int) -> Clip:
        random = torch.Generator().manual_seed(seed)
        clip = self._draw(random)
        if torch.rand((), generator=random) < self.paste:
            clip = paste_objects(clip, self._draw(random), random)
        return visible_objects(clip)

    def _draw(self, random: torch.Generator) -> Clip:
        sequence = self.sequences[int(torch.randint(len(self.sequences), (), generator=random))]
        still = bool(torch.rand((), generator=random) < self.still)
        indices = self._pick_frames(len(sequence.frame_paths), still, random)
        pixels = np.stack([pictures.read_image(sequence.frame_paths[index]) for index in indices])
        labels = np.stack([_read_labels(sequence.mask_paths[index]) for index in indices])
        frames = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        clip = random_view(frames, torch.from_numpy(labels), self.size, random, jitter=1.0 if still else 0.3)
        return Clip(random_color(clip.frames, random), clip.labels)

    def _pick_frames(self, length: int, still: bool, random: torch.Generator) -> list[int]:
        if still:
            return [int(torch.randint(length, (), generator=random))] * self.frames
        steps = torch.randint(1, self.max_skip + 1, (self.frames - 1,), generator=random).tolist()
        while sum(steps) >= length:
            steps = [max(1, step // 2) for step in steps]
        start = int(torch.randint(length - sum(steps), (), generator=random))
        indices = [start + sum(steps[:count]) for count in range(self.frames)]
        # a video runs both ways
        return indices[::-1] if torch.rand((), generator=random) < 0.5 else indices
