"""A session's state at one step, immutable: each step of the user makes a new one, so that undo is exact."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stm_model.interactive.blending import overwrite

LEVELS = 255
"""Soft masks are stored in steps of 1/255: one byte a pixel, compressed to a few kilobytes a frame."""


@dataclass(frozen=True)
class FrameMasks:
    """The soft masks of one frame at the network's size, compressed."""

    objects: tuple[int, ...]
    packed: bytes
    """Their probabilities in 1/255, uint8 `[n, h, w]`, by zlib."""

    @classmethod
    def pack(cls, objects: tuple[int, ...], probabilities: Tensor) -> FrameMasks:
        """Store probabilities of objects, float `[n, h, w]`; what they leave is background."""
        levels = (probabilities * LEVELS).round().to(torch.uint8).cpu().numpy()
        return cls(objects, zlib.compress(levels.tobytes(), 1))

    def unpack(self, size: tuple[int, int], objects: Sequence[int] | None = None) -> Tensor:
        """Probabilities of background and objects, float32 `[n + 1, h, w]`, of `size`, in the order of `objects`, 0
        everywhere for those without a mask; None is this frame's own. Raises a ValueError if the size is another one.
        """
        stored = _decompress(self.packed, len(self.objects) * size[0] * size[1])
        levels = torch.from_numpy(stored.reshape(len(self.objects), *size).copy()).float()
        background = (LEVELS - levels.sum(0, keepdim=True)).clamp(min=0)
        probabilities = torch.cat([background, levels])
        # rounded up, the masks of several objects may sum to slightly more than one
        probabilities /= probabilities.sum(0, keepdim=True)
        if objects is None or tuple(objects) == self.objects:
            return probabilities
        chosen = torch.zeros(1 + len(objects), *size)
        chosen[0] = probabilities[0]
        for channel, label in enumerate(objects, start=1):
            if label in self.objects:
                chosen[channel] = probabilities[1 + self.objects.index(label)]
        return chosen

    def with_objects(self, labels: tuple[int, ...], given: Tensor) -> FrameMasks:
        """These masks with those of m objects replaced or added, `[m, h, w]`; see `overwrite`."""
        objects = (*self.objects, *(label for label in labels if label not in self.objects))
        height, width = given.shape[-2:]
        channels = [1 + objects.index(label) for label in labels]
        return FrameMasks.pack(objects, overwrite(self.unpack((height, width), objects), channels, given)[1:])


NO_MASKS = FrameMasks((), zlib.compress(b""))
"""Of a frame that was not segmented: all background."""


def pack_bits(mask: np.ndarray) -> bytes:
    """Compress a bool mask `[H, W]`."""
    return zlib.compress(np.packbits(mask).tobytes(), 1)


def unpack_bits(packed: bytes, size: tuple[int, int]) -> np.ndarray:
    """The mask from `pack_bits`. Raises a ValueError if it has another size."""
    pixels = size[0] * size[1]
    return np.unpackbits(_decompress(packed, -(-pixels // 8)), count=pixels).reshape(size).astype(bool)


def _decompress(packed: bytes, length: int) -> np.ndarray:
    try:
        # bounded: a file may hold anything
        content = zlib.decompressobj().decompress(packed, length + 1)
    except zlib.error as error:
        raise ValueError(f"a mask cannot be unpacked ({error})") from error
    if len(content) != length:
        raise ValueError(f"a mask of another size: expected {length} bytes, got {len(content)}")
    return np.frombuffer(content, dtype=np.uint8)


@dataclass(frozen=True)
class State:
    """A session at one step of its history."""

    action: str = "opened"  # the step that led here
    objects: tuple[int, ...] = ()  # labels in the order they were first drawn
    # frame → all scribbles ever drawn on it
    scribbles: Mapping[int, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    # frame → object → its painted mask at the frame's size, by `pack_bits`
    painted: Mapping[int, Mapping[int, bytes]] = field(default_factory=dict)
    masks: Mapping[int, FrameMasks] = field(default_factory=dict)
    fresh: frozenset[int] = frozenset()  # frames annotated since the last round
    rounds: int = 0  # rounds run

    @property
    def annotated(self) -> tuple[int, ...]:
        """Frames with scribbles or painted masks."""
        return tuple(sorted({*self.scribbles, *self.painted}))

    def with_scribbles(self, frame: int, scribbles: tuple[Mapping[str, Any], ...]) -> State:
        """More scribbles on a frame; its painted masks may change from now on."""
        return replace(
            self._with_objects([scribble["object_id"] for scribble in scribbles]),
            action=f"scribbles on frame {frame}",
            scribbles={**self.scribbles, frame: self.scribbles.get(frame, ()) + scribbles},
            painted={index: masks for index, masks in self.painted.items() if index != frame},
            fresh=self.fresh | {frame},
        )

    def with_paint(self, frame: int, label: int, mask: np.ndarray, soft: Tensor) -> State:
        """An object's painted mask on a frame, bool `[H, W]`, and the same at the network's size, `[h, w]`."""
        others = {
            other: pack_bits(unpack_bits(packed, mask.shape) & ~mask)
            for other, packed in self.painted.get(frame, {}).items()
            if other != label
        }
        masks = self.masks.get(frame, NO_MASKS).with_objects((label,), soft[None])
        return replace(
            self._with_objects([label]),
            action=f"object {label} painted on frame {frame}",
            painted={**self.painted, frame: {**others, label: pack_bits(mask)}},
            masks={**self.masks, frame: masks},
            fresh=self.fresh | {frame},
        )

    def _with_objects(self, labels: list[int]) -> State:
        new = dict.fromkeys(label for label in labels if label and label not in self.objects)
        return replace(self, objects=(*self.objects, *new))
