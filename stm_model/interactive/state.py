"""A session's state at one step, immutable: each step of the user makes a new one, so that undo is exact."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stm_model.interactive.blending import overwrite

UNCERTAIN = 0.8
"""A certainty below which a frame is worth a look: on DAVIS' held-out sequences these have a J below 0.7."""
FAINT = 0.1
"""Smaller probabilities of a pixel are no sign of an object."""
LEVELS = 255
"""Soft masks are stored in steps of 1/255: one byte a pixel, compressed to a few kilobytes a frame."""

MAX_NAME = 40
"""Characters of an object's name."""


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

    def without(self, label: int) -> FrameMasks:
        """These masks without one of their objects: its pixels become background, others stay as they are."""
        place = self.objects.index(label)
        levels = self._levels().astype(np.float32)
        gone, kept = levels[place], np.delete(levels, place, 0)
        rest = LEVELS - gone
        won = gone >= np.maximum(rest - kept.sum(0), kept.max(0, initial=0))
        # elsewhere its share goes to all in proportion, so that none of them wins over another
        kept = np.where(won, kept, kept * LEVELS / np.maximum(rest, 1)).round().astype(np.uint8)
        return FrameMasks((*self.objects[:place], *self.objects[place + 1 :]), zlib.compress(kept.tobytes(), 1))

    @cached_property
    def certainty(self) -> float:
        """That of the least certain object, 0 to 1."""
        return min((certainty(levels / np.float32(LEVELS)) for levels in self._levels()), default=1.0)

    def _levels(self) -> np.ndarray:
        """uint8 `[n, h·w]`."""
        return np.frombuffer(zlib.decompress(self.packed), dtype=np.uint8).reshape(len(self.objects), -1)


NO_MASKS = FrameMasks((), zlib.compress(b""))
"""Of a frame that was not segmented: all background."""


def certainty(probabilities: np.ndarray) -> float:
    """How sure an object's mask is, 0 to 1: the mean of its probabilities `[h, w]`, weighted by themselves. An object
    that is nowhere is surely so.
    """
    seen = probabilities[probabilities >= FAINT]
    return float((seen**2).sum() / seen.sum()) if len(seen) else 1.0


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
    names: Mapping[int, str] = field(default_factory=dict)  # object → what the user calls it
    colors: Mapping[int, str] = field(default_factory=dict)  # object → the color the user gave it, #rrggbb

    def name(self, label: int) -> str:
        """What an object is called."""
        return self.names.get(label, f"object {label}")

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

    def with_look(self, label: int, name: str | None, color: str | None) -> State:
        """An object's name and color; None leaves them."""
        return replace(
            self,
            action=f"name and color of object {label}",
            names=self.names if name is None else {**self.names, label: name},
            colors=self.colors if color is None else {**self.colors, label: color},
        )

    def without(self, label: int) -> State:
        """All but one object: its scribbles and masks are gone."""
        scribbles = {
            frame: kept
            for frame, drawn in self.scribbles.items()
            if (kept := tuple(scribble for scribble in drawn if scribble["object_id"] != label))
        }
        painted = {frame: left for frame, masks in self.painted.items() if (left := _without(masks, label))}
        return replace(
            self,
            action=f"object {label} deleted",
            objects=tuple(other for other in self.objects if other != label),
            scribbles=scribbles,
            painted=painted,
            masks={
                frame: masks.without(label) if label in masks.objects else masks for frame, masks in self.masks.items()
            },
            fresh=self.fresh & (scribbles.keys() | painted.keys()),
            names=_without(self.names, label),
            colors=_without(self.colors, label),
        )

    def _with_objects(self, labels: list[int]) -> State:
        new = dict.fromkeys(label for label in labels if label and label not in self.objects)
        return replace(self, objects=(*self.objects, *new))


def check_look(state: State, label: int, name: str | None, color: str | None) -> None:
    """Raise a ValueError unless an object may have this name and color; None is none."""
    if label not in state.objects:
        known = ", ".join(map(str, state.objects)) or "none yet"
        raise ValueError(f"object {label} is unknown; expected one of {known}")
    if name is not None:
        if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(f"name: expected 1 to {MAX_NAME} printable characters, got {name!r}")
        if other := next((each for each in state.objects if each != label and state.name(each) == name), None):
            raise ValueError(f"name: object {other} is called {name!r} already")
    if color is not None and not re.fullmatch("#[0-9a-f]{6}", color):
        raise ValueError(f"color: expected #rrggbb in lower case, got {color!r}")


def _without(given: Mapping[int, Any], label: int) -> dict[int, Any]:
    return {other: value for other, value in given.items() if other != label}
