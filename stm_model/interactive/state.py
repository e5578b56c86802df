"""What a session stands at: annotations and masks that never change; every step of a user makes a new state."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = 255
"""Steps in which a soft mask is kept: one byte a pixel, which packs to a few kilobytes a frame."""


@dataclass(frozen=True)
class FrameMasks:
    """The soft masks of one frame at the network's size."""

    objects: tuple[int, ...]
    """Labels of the objects, in the order of the masks."""
    packed: bytes
    """Their probabilities in 1/255, uint8 `[n, h, w]`, compressed."""

    @classmethod
    def pack(cls, objects: tuple[int, ...], probabilities: Tensor) -> FrameMasks:
        """Keep the probabilities of objects, float `[n, h, w]`, 0…1."""
        levels = (probabilities * LEVELS).round().to(torch.uint8).cpu().numpy()
        return cls(objects, zlib.compress(levels.tobytes(), 1))

    def unpack(self, size: tuple[int, int]) -> Tensor:
        """The probabilities of background and objects, float32 `[n + 1, h, w]`; they sum to one.

        Raises:
            ValueError: what is packed has another size.
        """
        levels = _decompress(self.packed, len(self.objects) * size[0] * size[1])
        levels = torch.from_numpy(levels.reshape(len(self.objects), *size).copy()).float()
        background = (LEVELS - levels.sum(0, keepdim=True)).clamp(min=0)
        probabilities = torch.cat([background, levels])
        # rounded up, the masks of several objects may come to a little more than one
        return probabilities / probabilities.sum(0, keepdim=True)

    def with_objects(self, labels: tuple[int, ...], given: Tensor) -> FrameMasks:
        """These masks with those of some objects replaced, or added; the others keep what room is left.

        Args:
            labels: m objects.
            given: their probabilities, `[m, h, w]`, in sum at most one.
        """
        objects = (*self.objects, *(label for label in labels if label not in self.objects))
        probabilities = torch.zeros(1 + len(objects), *given.shape[-2:])
        probabilities[: 1 + len(self.objects)] = self.unpack(given.shape[-2:])
        channels = [1 + objects.index(label) for label in labels]
        # where an object was that is now given, is background
        probabilities[0] += probabilities[channels].sum(0)
        probabilities *= 1 - given.sum(0)
        probabilities[channels] = given
        return FrameMasks.pack(objects, probabilities[1:])


NO_MASKS = FrameMasks((), zlib.compress(b""))
"""Of a frame that was not segmented: all of it is background."""


def pack_bits(mask: np.ndarray) -> bytes:
    """Keep a bool mask `[H, W]`."""
    return zlib.compress(np.packbits(mask).tobytes(), 1)


def unpack_bits(packed: bytes, size: tuple[int, int]) -> np.ndarray:
    """The mask of `pack_bits`. Raises a ValueError if it has another size."""
    pixels = size[0] * size[1]
    return np.unpackbits(_decompress(packed, -(-pixels // 8)), count=pixels).reshape(size).astype(bool)


def _decompress(packed: bytes, length: int) -> np.ndarray:
    try:
        # never more than what is expected: a file may hold anything
        content = zlib.decompressobj().decompress(packed, length + 1)
    except zlib.error as error:
        raise ValueError(f"a mask cannot be unpacked ({error})") from error
    if len(content) != length:
        raise ValueError(f"a mask of another size: expected {length} bytes, got {len(content)}")
    return np.frombuffer(content, dtype=np.uint8)


@dataclass(frozen=True)
class State:
    """A session at one step of its history."""

    action: str = "opened"
    """What led here."""
    objects: tuple[int, ...] = ()
    """Labels of the objects in the order they were drawn."""
    scribbles: Mapping[int, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    """Frame → all scribbles ever drawn on it."""
    painted: Mapping[int, Mapping[int, bytes]] = field(default_factory=dict)
    """Frame → object → the mask that it was given there, by `pack_bits` at the frame's size."""
    masks: Mapping[int, FrameMasks] = field(default_factory=dict)
    """Frame → what it was segmented to."""
    fresh: frozenset[int] = frozenset()
    """Frames annotated since the last round."""
    rounds: int = 0
    """Rounds run."""

    @property
    def annotated(self) -> tuple[int, ...]:
        """Frames with scribbles or painted masks."""
        return tuple(sorted({*self.scribbles, *self.painted}))

    def with_scribbles(self, frame: int, scribbles: tuple[Mapping[str, Any], ...]) -> State:
        """More scribbles on a frame. A mask painted there is from now on one that scribbles correct."""
        return replace(
            self._with_objects([scribble["object_id"] for scribble in scribbles]),
            action=f"scribbles on frame {frame}",
            scribbles={**self.scribbles, frame: self.scribbles.get(frame, ()) + scribbles},
            painted={index: masks for index, masks in self.painted.items() if index != frame},
            fresh=self.fresh | {frame},
        )

    def with_paint(self, frame: int, label: int, mask: np.ndarray, masks: FrameMasks) -> State:
        """The mask of an object on a frame, and with it what the frame is segmented to."""
        painted = {
            other: pack_bits(unpack_bits(packed, mask.shape) & ~mask)
            for other, packed in self.painted.get(frame, {}).items()
            if other != label
        }
        return replace(
            self._with_objects([label]),
            action=f"object {label} painted on frame {frame}",
            painted={**self.painted, frame: {**painted, label: pack_bits(mask)}},
            masks={**self.masks, frame: masks},
            fresh=self.fresh | {frame},
        )

    def _with_objects(self, labels: list[int]) -> State:
        new = dict.fromkeys(label for label in labels if label and label not in self.objects)
        return replace(self, objects=(*self.objects, *new))


def blend_weights(frame_count: int, fresh: frozenset[int], settled: frozenset[int]) -> np.ndarray:
    """How much a round's masks count against those before it, for every frame.

    One at a frame annotated for this round, falling linearly to zero at the next frame on either side that was
    annotated for an earlier one, and zero beyond it; one up to the video's end where there is none.

    Args:
        frame_count: T.
        fresh: frames annotated for this round.
        settled: other annotated frames.

    Returns:
        float64 `[T]`, 0…1.

    Source: Oh et al. 2019, Fast User-Guided Video Object Segmentation by Interaction-and-Propagation Networks.
    """
    weights = np.zeros(frame_count)
    times = np.arange(frame_count)
    for frame in fresh:
        after = min((other for other in settled if other > frame), default=np.inf)
        before = max((other for other in settled if other < frame), default=-np.inf)
        falling = np.where(times >= frame, (times - frame) / (after - frame), (frame - times) / (frame - before))
        weights = np.maximum(weights, 1 - np.clip(falling, 0, 1))
    return weights


def mix(new: Tensor, new_objects: tuple[int, ...], old: FrameMasks, weight: float) -> Tensor:
    """Mix a round's masks of a frame with those before it.

    Args:
        new: probabilities `[n + 1, h, w]` of background and `new_objects`.
        new_objects: labels; those that `old` does not have keep what is new.
        old: the frame's masks before, of some of the objects.
        weight: of what is new, 0…1.

    Returns:
        Probabilities `[n + 1, h, w]`.
    """
    before = torch.zeros_like(new)
    known = [0, *(1 + new_objects.index(label) for label in old.objects)]
    before[known] = old.unpack(new.shape[-2:])
    entered = [channel for channel in range(1, len(new)) if channel not in known]
    before *= 1 - new[entered].sum(0)
    before[entered] = new[entered]
    return weight * new + (1 - weight) * before
