"""One video, tracked as its frames come: a frame in, its masks out; objects may enter, be corrected and leave."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stm_model.labels import VOID, objects_in
from stm_model.network import STM, STRIDE, Query, aggregated, other_object_masks
from stm_model.tracking.bank import MemoryBank
from stm_model.tracking.both_ways import Backward, Hint
from stm_model.tracking.frames import (
    Frame,
    as_array,
    check_frame,
    check_mask,
    check_size,
    pad_to_stride,
    prepare_frame,
    prepare_mask,
    scaled_size,
    winners_of,
)
from stm_model.tracking.reach import hold_back
from stm_model.tracking.result import FrameResult
from stm_model.tracking.trust import UNTRUSTED, GivenMasks, agreement_of, cells_of, certainty_of

WRONG = 0.5
"""A given mask corrects an object, and is not just one more, if J of what was found is lower."""
CORRECTION_WEIGHT = 4
"""How many frames a correction counts for: it says what the network gets wrong."""


class EncodedFrame(NamedTuple):
    """What is computed of a frame alone."""

    image: Tensor
    """float32 `[1, 3, h, w]`, as the network sees it, not padded."""
    query: Query | None
    """Of the padded image."""


@dataclass
class _Previous:
    """The frame that was segmented last."""

    index: int
    frame: Frame
    """uint8 `[H, W, 3]`, as it was given."""
    image: Tensor
    """float32 `[1, 3, h, w]`, as the network sees it, not padded."""
    probabilities: Tensor
    """`[n + 1, h, w]`, background first."""
    familiarity: list[float]
    """Of each object, see `FrameResult`; likewise the certainty."""
    query: Query | None
    """What was computed of the frame alone, if it was segmented and its key is shared."""
    certainty: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    """Of each object with the masks before, see `agreement_of`; 1 for a mask that the user gave."""
    given: dict[int, int] = field(default_factory=dict)
    """Label of an object whose mask the user gave → how many frames it counts for."""
    _cells: tuple[Tensor, Tensor] | None = None
    """Probabilities, and their cells."""

    @property
    def cells(self) -> Tensor:
        """`cells_of` the objects."""
        if self._cells is None or self._cells[0] is not self.probabilities:
            self._cells = self.probabilities, cells_of(self.probabilities[1:])
        return self._cells[1]

    @property
    def trust(self) -> list[float]:
        """Of each object, see `FrameResult`."""
        return [certainty * agreement for certainty, agreement in zip(self.certainty, self.agreement)]


class TrackingSession:
    """The objects of one video, followed frame by frame; made by `Tracker.start`.

    What is corrected, added or removed after a frame counts for that frame's result, and for all frames after it.

    Args:
        model: as `Tracker` prepared it.
        bank: an empty memory.
        masks: given masks by frame index, checked.
        shorter_side: of the network's frames, None is the video's own.
        skip_uncertain: as in `Tracker`.
        backward: what was tracked backwards, if it was.
    """

    def __init__(
        self,
        model: STM,
        bank: MemoryBank,
        masks: dict[int, np.ndarray],
        shorter_side: int | None,
        skip_uncertain: bool,
        backward: Backward | None = None,
    ):
        self.model, self.bank, self.masks, self.skip_uncertain = model, bank, masks, skip_uncertain
        self.backward = backward
        self.shorter_side, self.device = shorter_side, next(model.parameters()).device
        self.given_masks = GivenMasks(**bank.read_options)
        self.objects: list[int] = []
        """Label of each object, in the order they entered."""
        self.previous: _Previous | None = None

    @torch.inference_mode()
    def step(self, frame: Frame, encoded: Future[EncodedFrame | None] | None = None) -> FrameResult:
        """Segment the next frame.

        Args:
            frame: RGB uint8 `[H, W, 3]`: an array, a tensor on any device, or a PIL image.
            encoded: what `encode` gives of it, if that is on its way.

        Raises:
            ValueError: the frame or its mask has another form or size than those before; the memory's budget is full.
        """
        index = 0 if self.previous is None else self.previous.index + 1
        pixels = check_frame(frame, index, self._frame_size)
        mask = self.masks.get(index)
        if mask is not None:
            check_size(mask, pixels, index)
        known = None if encoded is None else encoded.result()
        if known is None:
            known = EncodedFrame(self._prepare(pixels), None)
        image = known.image
        query, probabilities, familiarity = self._segment(image, known.query)
        if self.backward is not None and (hints := self.backward.hints(index, self.device)):
            probabilities = self._mix(probabilities, hints)
            familiarity += [-math.inf] * (len(self.objects) - len(familiarity))
        kept = query if self.model.shares_keys else None
        before, self.previous = self.previous, _Previous(index, pixels, image, probabilities, familiarity, kept)
        self.previous.agreement = [1.0] * len(self.objects)
        if query is not None and before is not None:
            cells = before.cells, self.previous.cells
            self.previous.agreement = agreement_of(query.key, self.given_masks, self.objects, *cells)
        return self._apply(mask)

    @torch.inference_mode()
    def encode(self, frame: Frame) -> EncodedFrame | None:
        """What can be computed of a frame alone; None of one that `step` will refuse."""
        try:
            image = self._prepare(check_frame(frame, 0, None))
        except (TypeError, ValueError):
            return None
        return EncodedFrame(image, self.model.encode_query(pad_to_stride(image)[0]))

    @torch.inference_mode()
    def correct(self, mask: np.ndarray | Tensor) -> FrameResult:
        """Replace what was found in the last frame, and take in objects that enter there.

        Args:
            mask: label map `[H, W]`: 0 says nothing, 1…254 are objects, 255 is void. The mask of a tracked label is
                replaced; another label is a new object.

        Raises:
            ValueError: no frame was given yet; the mask has the wrong form or size.
        """
        previous = self._last()
        checked = check_mask(mask, previous.index)
        check_size(checked, previous.frame, previous.index)
        if (given := self.masks.get(previous.index)) is not None:
            rest = np.where(np.isin(given, sorted(objects_in(checked))), 0, given)
            checked = np.where(checked == 0, rest, checked)
        self.masks[previous.index] = checked
        return self._apply(checked)

    def add_object(self, label: int, mask: np.ndarray | Tensor) -> FrameResult:
        """Follow one more object, from the last frame on.

        Args:
            label: 1…254, of no other object.
            mask: `[H, W]`, true or not 0 where the object is.

        Raises:
            ValueError: no frame was given yet; the label is another object's or makes no sense; the mask is empty or of
                another size.
        """
        if label in self.objects:
            raise ValueError(f"object {label}: expected a label that is not tracked yet; `correct` replaces its mask")
        if not 1 <= label < VOID:
            raise ValueError(f"object {label}: expected a label from 1 to {VOID - 1}")
        found = np.asarray(mask) != 0
        if not found.any():
            raise ValueError(f"object {label}: expected a mask with the object in it, got an empty one")
        return self.correct(found * np.uint8(label))

    @torch.inference_mode()
    def remove(self, label: int) -> FrameResult:
        """Follow an object no longer: the last frame's result without it, what is remembered of it forgotten.

        Raises:
            ValueError: no such object is tracked.
        """
        if label not in self.objects:
            raise ValueError(f"object {label}: expected one of {self.objects}, which are tracked")
        previous, place = self._last(), self.objects.index(label)
        probabilities = previous.probabilities.clone()
        probabilities[0] += probabilities[1 + place]
        staying = [channel for channel in range(len(probabilities)) if channel != 1 + place]
        self.bank.remove(place)
        self.given_masks.remove(label)
        del self.objects[place]
        previous.probabilities = probabilities[staying]
        previous.given.pop(label, None)
        previous.familiarity = previous.familiarity[:place] + previous.familiarity[place + 1 :]
        previous.agreement = previous.agreement[:place] + previous.agreement[place + 1 :]
        mask = self.masks.get(previous.index)
        if mask is not None:
            mask = self.masks[previous.index] = np.where(mask == label, 0, mask)
        return self._result(mask)

    def state(self) -> dict[str, Any]:
        """All that going on after the last frame needs; what is remembered as `PagedMemory.state`.

        Raises:
            ValueError: no frame was given yet.
        """
        previous = self._last()
        return {
            "index": previous.index,
            "frame": torch.from_numpy(np.ascontiguousarray(as_array(previous.frame))),
            "probabilities": previous.probabilities,
            "given": previous.given,
            "certainty": previous.certainty,
            "agreement": previous.agreement,
            "given masks": self.given_masks.state(),
            "objects": list(self.objects),
            "bank": self.bank.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Be where another one was at its `state`."""
        frame = state["frame"].numpy()
        image = prepare_frame(frame, scaled_size(frame.shape[:2], self.shorter_side), self.device)
        probabilities = state["probabilities"].to(self.device, copy=True)
        self.objects = list(state["objects"])
        unknown = [-math.inf] * len(self.objects)
        self.previous = _Previous(state["index"], frame, image, probabilities, unknown, None)
        self.previous.given, self.previous.certainty = dict(state["given"]), list(state["certainty"])
        self.previous.agreement = list(state["agreement"])
        self.given_masks.load_state(state["given masks"], self.device)
        self.bank.load_state(state["bank"], self.device)

    @property
    def _frame_size(self) -> tuple[int, int] | None:
        """Height and width of the frames, once one is known."""
        return None if self.previous is None else self.previous.frame.shape[:2]

    def _last(self) -> _Previous:
        if self.previous is None:
            raise ValueError("expected a frame to be tracked before, got none")
        return self.previous

    def _apply(self, mask: np.ndarray | None) -> FrameResult:
        """The last frame's result with a given mask of it."""
        previous = self._last()
        if mask is not None:
            # of the mask as given: an object too small for the network's size is still an object
            given = frozenset(objects_in(mask))
            size = scaled_size(mask.shape, self.shorter_side)
            labels = prepare_mask(mask, size, self.device)
            wrong = self._forget_wrong(labels, given)
            previous.probabilities = self._overwrite(previous.probabilities, labels, given)
            for label in given:
                counts = CORRECTION_WEIGHT if label in wrong else 1
                previous.given[label] = max(previous.given.get(label, 0), counts)
            previous.familiarity += [-math.inf] * (len(self.objects) - len(previous.familiarity))
            previous.agreement += [1.0] * (len(self.objects) - len(previous.agreement))
            for label in given:
                previous.agreement[self.objects.index(label)] = 1.0
        return self._result(mask)

    def _result(self, mask: np.ndarray | None) -> FrameResult:
        """The last frame's result, with the mask that was given of it."""
        previous = self._last()
        probabilities = full = previous.probabilities
        winners = winners_of(probabilities)
        previous.certainty = certainty_of(probabilities, winners)
        frame_size = previous.frame.shape[:2]
        resized = previous.image.shape[-2:] != frame_size
        if resized:
            full = F.interpolate(full[None], frame_size, mode="bilinear", align_corners=False)[0]
            winners = winners_of(full)
        labels = np.array([0, *self.objects], np.uint8).take(winners)
        if mask is not None and resized:
            # a given mask comes back exactly as it was given, though the network saw it resized
            objects = sorted(objects_in(mask))
            labels = np.where(np.isin(labels, objects) & (mask != VOID), 0, labels)
            labels = np.where(np.isin(mask, objects), mask, labels)
        signals = tuple(previous.certainty), tuple(previous.familiarity), tuple(previous.trust)
        return FrameResult(previous.index, labels, full, tuple(self.objects), *signals)

    def _prepare(self, pixels: Frame) -> Tensor:
        """A checked frame as the network sees it, float32 `[1, 3, h, w]`, not padded."""
        return prepare_frame(pixels, scaled_size(pixels.shape[:2], self.shorter_side), self.device)

    def _segment(self, image: Tensor, query: Query | None) -> tuple[Query | None, Tensor, list[float]]:
        """The query of a frame, which may be known, probabilities `[n + 1, h, w]` of the objects known so far, and
        their familiarity.
        """
        if not self.objects or self.previous is None:
            return None, torch.ones(1, *image.shape[-2:], device=self.device), []
        masks = pad_to_stride(self.previous.probabilities[1:])[0]
        others = other_object_masks(masks)
        cells = F.max_pool2d(masks, STRIDE)
        self._remember(self.previous, masks, others, cells)
        padded, (top, left) = pad_to_stride(image)
        query = self.model.encode_query(padded) if query is None else query
        readout, similarity = self.bank.read(query.key, cells)
        objects = self.model.segment(readout, query, [len(self.objects)], (masks, others))
        # of the padded frame, whose cells are whole
        found = F.avg_pool2d(objects, STRIDE)
        familiarity = ((found * similarity).sum((1, 2)) / found.sum((1, 2)).clamp(min=1e-12)).tolist()
        if self.model.config.prior:
            objects = hold_back(objects, found, cells)
        height, width = image.shape[-2:]
        seen = objects[:, top : top + height, left : left + width]
        return query, aggregated(seen), familiarity

    def _remember(self, previous: _Previous, masks: Tensor, others: Tensor, cells: Tensor) -> None:
        """Put the previous frame with its soft masks `[n, H, W]` and cells `[n, h, w]` where memories want it."""
        given = [previous.given.get(label, 0) for label in self.objects]
        certain = [not self.skip_uncertain or value >= UNTRUSTED for value in previous.trust]
        entries = self.bank.wanted(previous.index, given, certain)
        if not entries:
            return
        frame = pad_to_stride(previous.image)[0] if previous.query is None else previous.query
        key, value = self.model.memorize(frame, masks, others, [len(masks)])
        if places := [place for place, count in enumerate(given) if count]:
            keys = key if len(key) == 1 else key[places]
            self.given_masks.add([self.objects[place] for place in places], keys, F.avg_pool2d(masks[places], STRIDE))
        self.bank.remember(previous.index, entries, key, value, cells)

    def _forget_wrong(self, labels: Tensor, given: frozenset[int]) -> set[int]:
        """Forget the frames since the last given mask of each object whose mask in the last frame was wrong: they would
        outvote the right one.

        Args:
            labels: the given mask, `[h, w]`.
            given: the objects in it.

        Returns:
            The labels of those that were wrong.
        """
        previous = self._last()
        winners, known, since = winners_of(previous.probabilities), labels != VOID, {}
        for place, label in enumerate(self.objects):
            found, true = torch.from_numpy(winners == 1 + place).to(self.device) & known, labels == label
            if label in given and (found & true).sum() < WRONG * (found | true).sum():
                before = (index for index, mask in self.masks.items() if index < previous.index and label in mask)
                since[place] = max(before, default=-1)
        if since:
            self.bank.forget_since(since)
        return {self.objects[place] for place in since}

    def _overwrite(self, probabilities: Tensor, labels: Tensor, given: frozenset[int]) -> Tensor:
        """Overwrite predictions by a given mask and take in new objects; void pixels keep their prediction."""
        probabilities = self._take_in(given, probabilities)
        known, named = labels != VOID, torch.zeros_like(labels, dtype=torch.bool)
        probabilities = probabilities.clone()
        for label in given:
            channel = 1 + self.objects.index(label)
            # where an object that was given is not, what was predicted for it becomes background
            lost = torch.where(known, probabilities[channel], 0)
            probabilities[0] += lost
            probabilities[channel] -= lost
            named |= labels == label
        probabilities[:, named] = 0
        for label in given:
            probabilities[1 + self.objects.index(label)][labels == label] = 1
        return probabilities

    def _take_in(self, labels: Iterable[int], probabilities: Tensor) -> Tensor:
        """Take in the objects among `labels` that are new; the probabilities with theirs, which are 0."""
        new = sorted(set(labels) - set(self.objects))
        if not new:
            return probabilities
        self.objects += new
        self.bank.add_objects(len(new))
        absent = torch.zeros(len(new), *probabilities.shape[1:], device=self.device)
        return torch.cat([probabilities, absent])

    def _mix(self, probabilities: Tensor, hints: list[Hint]) -> Tensor:
        """Mix in what was tracked backwards; the other objects and the background share what that leaves."""
        probabilities = self._take_in([hint.label for hint in hints], probabilities)
        certainty = certainty_of(probabilities, winners_of(probabilities))
        places = [self.objects.index(hint.label) for hint in hints]
        channels = [1 + place for place in places]
        each = [hint.weight(certainty[place]) for hint, place in zip(hints, places)]
        weights = torch.tensor(each, device=self.device).view(-1, 1, 1)
        mixed = torch.lerp(probabilities[channels], torch.stack([hint.mask for hint in hints]), weights)
        mixed /= mixed.sum(0).clamp(min=1)
        rest = probabilities.index_fill(0, torch.tensor(channels, device=self.device), 0)
        rest *= (1 - mixed.sum(0)) / rest.sum(0).clamp(min=1e-6)
        rest[channels] = mixed
        rest[0] += 1 - rest.sum(0)
        return rest.clamp_(min=0)
