"""What is tracked backwards, from the masks of later frames towards the start, kept for the pass forwards."""

import itertools
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stm_model.io.files import whole
from stm_model.labels import objects_in

WINDOW = 32
"""Frames of a video that are read at a time, and held, to go through it backwards."""


class Hint(NamedTuple):
    """What the pass backwards found of an object in a frame."""

    label: int
    nearness: float
    """How near its given mask is: 0 at the one before the frame, 1 at the one after it."""
    certainty: float
    """See `FrameResult`."""
    mask: Tensor
    """Probabilities, float32 `[h, w]` at the network's size."""

    def weight(self, certainty: float) -> float:
        """Its weight in the mean with what the pass forwards finds with a `certainty`; one that lost it says little."""
        backward, forward = self.nearness * self.certainty**2, (1 - self.nearness) * certainty**2
        return backward / (backward + forward) if backward + forward else self.nearness


class Backward:
    """The pass backwards: where it begins and ends, and a folder with what it found.

    Between two frames with a given mask of an object both passes count, each the more the nearer its own is and the
    surer it is of the object; before an object's first the pass backwards alone does.

    Args:
        folder: for a file a frame.
        masks: given masks, frame → label map `[H, W]`.
    """

    def __init__(self, folder: Path, masks: Mapping[int, np.ndarray]):
        self.folder, self.masks = folder, masks
        self.given: dict[int, list[int]] = {}
        """Frames with a given mask of each object, in order."""
        for index in sorted(masks):
            for label in objects_in(masks[index]):
                self.given.setdefault(label, []).append(index)
        self.start = max((frames[-1] for frames in self.given.values()), default=0)
        """Frame at which it begins; it ends at 0."""

    @property
    def mirrored(self) -> dict[int, np.ndarray]:
        """The given masks, by the order in which the pass comes to them."""
        return {self.start - index: mask for index, mask in self.masks.items() if index <= self.start}

    def write(self, index: int, masks: Mapping[int, Tensor], certainty: Sequence[float]) -> None:
        """Keep the soft masks `[h, w]` of a frame's objects, in eight bits, and their certainties; whole or not at
        all.
        """
        planes = torch.stack([*masks.values()]).mul(255).round().to(torch.uint8).cpu().numpy()
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole(self._file(index)) as partial:
            np.savez_compressed(partial, labels=np.array([*masks], np.uint8), planes=planes, certainty=certainty)

    def hints(self, index: int, device: torch.device) -> list[Hint]:
        """What is known of the objects in a frame that the pass has seen. Raises OSError if its file is gone or
        damaged.
        """
        near = {label: self._nearness(label, index) for label in self.given}
        if index > self.start or not any(near.values()):
            return []
        file = self._file(index)
        try:
            with np.load(file) as kept:
                labels, planes, certainty = (kept[name] for name in ("labels", "planes", "certainty"))
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError) as error:
            raise OSError(f"{file}: is damaged, --overwrite tracks anew") from error
        found = zip(labels.tolist(), certainty.tolist(), torch.from_numpy(planes).to(device).float() / 255)
        return [Hint(label, near[label], certainty, plane) for label, certainty, plane in found if near[label]]

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.npz"

    def _nearness(self, label: int, index: int) -> float:
        before = max((frame for frame in self.given[label] if frame <= index), default=None)
        after = min((frame for frame in self.given[label] if frame > index), default=None)
        if after is None:
            return 0.0
        return 1.0 if before is None else (index - before) / (after - before)


def backwards(frames: Any, start: int) -> Iterator[np.ndarray]:
    """The frames of a sequence or an opened video from `start` to 0, of a video `WINDOW` held at a time.

    Raises:
        ValueError: the video ends before `start`.
    """
    if not hasattr(frames, "frames_from"):
        yield from (frames[index] for index in range(start, -1, -1))
        return
    for last in range(start, -1, -WINDOW):
        first = max(0, last + 1 - WINDOW)
        window = list(itertools.islice(frames.frames_from(first), last + 1 - first))
        if len(window) <= last - first:
            raise ValueError(f"masks: frame {start} has one, but the video ends after {first + len(window)} frames")
        yield from reversed(window)
