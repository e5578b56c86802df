"""Semi-supervised tracking: frames stream in, masks stream out; only the memory is kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stm_kernels import memory_read
from stm_model.labels import VOID, objects_in
from stm_model.network import (
    STM,
    STRIDE,
    Query,
    compile_parts,
    fold_batch_norm,
    fuse_activations,
    other_object_masks,
    soft_aggregate,
)
from stm_model.tracking.budget import MemoryBudget, MemoryPlan, MemoryRule, plan_memory
from stm_model.tracking.frames import (
    check_frame,
    check_mask,
    check_side,
    pad_to_stride,
    prepare_frame,
    prepare_mask,
    scaled_size,
)
from stm_model.tracking.memory import MemoryBank
from stm_model.tracking.resume import array_digest, check_same

UNCERTAIN = 0.8
"""A certainty below which an object counts as lost: so low that on held-out videos few frames fall below it, and those
are lost.
"""


@dataclass(frozen=True)
class FrameResult:
    """One segmented frame."""

    index: int
    """Position of the frame in the video, from 0."""
    labels: np.ndarray
    """`[H, W]` uint8, the caller's own label values; 0 is background."""
    probabilities: Tensor
    """`[n + 1, H, W]` float32 on the model's device, background first, then `objects` in order; sums to one."""
    objects: tuple[int, ...]
    """Label value of each object, in the order they entered (ascending within a mask)."""
    certainty: tuple[float, ...] = ()
    """How sure the network is of each object: the mean probability over the pixels that it labels so, 0 where there
    are none. Below `UNCERTAIN` the object is likely lost."""
    familiarity: tuple[float, ...] = ()
    """How like what is remembered the picture looks where each object is: the logarithm of the mean exponential
    similarity that the memory read finds there; -inf before anything is remembered."""


class Tracker:
    """Follows objects through a video from their masks in the first frame, or in later ones.

    Args:
        model: the network, of which a copy with batch norm folded is kept; its device and dtype are where and how
            tracking runs.
        memory: which frames are remembered: a `MemoryRule` or its name, see `MemoryRule.parse`.
        size: length in pixels of the shorter side that frames are resized to for the network; None keeps their own.
            Results always come at the frames' own size.
        budget: how much may be remembered; None keeps everything, on the host where the device is full.
        skip_uncertain: don't keep frames for good in which an object of the memory is `UNCERTAIN`.
        compiled: compile encoders and decoder: some minutes before the first results, then less time a frame.
        top_k, skip, implementation: how the memory is read, see `stm_kernels.memory_read`.

    Raises:
        ValueError: the rule, the size or a setting of the read makes no sense, the network is guided by scribbles, or
            there is nothing to compile with.
    """

    def __init__(
        self,
        model: STM,
        *,
        memory: str | MemoryRule = "every:5",
        size: int | None = None,
        budget: MemoryBudget | None = None,
        skip_uncertain: bool = False,
        compiled: bool = False,
        top_k: int | None = None,
        skip: float = 0.0,
        implementation: str = "auto",
    ):
        model.expect_guidance("masks")
        if isinstance(memory, str):
            MemoryRule.parse(memory, frame_count=1)
        check_side(size)
        self.read_options: dict[str, Any] = {
            "similarity": model.config.similarity,
            "top_k": top_k,
            "skip": skip,
            "implementation": implementation,
        }
        # a setting that makes no sense is refused here, not at the second frame
        memory_read(*torch.zeros(3, 1, 0, 1), **self.read_options)
        folded = fold_batch_norm(model)
        self.model = compile_parts(folded) if compiled else fuse_activations(folded)
        self.memory, self.size, self.compiled = memory, size, compiled
        self.budget, self.skip_uncertain = budget or MemoryBudget(), skip_uncertain
        self.bank: MemoryBank | None = None
        """The memory of the video that is tracked, or was last."""
        self._video: _Video | None = None

    def track(
        self,
        frames: Iterable[np.ndarray],
        masks: Mapping[int, np.ndarray | Tensor],
        frame_count: int | None = None,
        *,
        resume: Mapping[str, Any] | None = None,
    ) -> Iterator[FrameResult]:
        """Segment a video frame by frame, as the frames come.

        Args:
            frames: RGB uint8 `[H, W, 3]`, all of one size; consumed one at a time.
            masks: frame index → label map `[H, W]`: 0 says nothing, 1…254 are objects, 255 is void. A label that was
                not seen before is a new object; one that was replaces the prediction of that object.
            frame_count: number of frames, if known; only the rule `uniform:K` needs it.
            resume: what `state` returned, to go on from there: the frames before it are passed over, the results after
                it are, on a CPU to the bit, those of a run that was never stopped.

        Yields:
            A result for every frame, in order. Before the first mask everything is background.

        Raises:
            ValueError: there are no frames; a frame or mask has the wrong form; no mask names an object; a setting, the
                weights, the masks or the frames are not those that the state was made with.
        """
        if frame_count is None and isinstance(frames, Sized):
            frame_count = len(frames)
        rule = self._rule(frame_count)
        checked = {int(index): check_mask(mask, index) for index, mask in masks.items()}
        if not any(objects_in(mask) for mask in checked.values()):
            raise ValueError("masks: expected at least one labelled object (1…254), got none")
        bank = MemoryBank(rule, self.budget, **self.read_options)
        video = _Video(self.model, bank, checked, self.size, self.skip_uncertain)
        if resume is not None:
            check_same(resume["made_with"], self._made_with(video, resume["video"]["index"]))
            video.load_state(resume["video"])
        self.bank, self._video = bank, video
        return self._track(frames, video)

    def state(self) -> dict[str, Any]:
        """All that `track` needs to go on after the result that it gave last, for `torch.save`.

        What is remembered is not copied: write it before asking for the next result.

        Raises:
            ValueError: no frame is tracked yet.
        """
        if self._video is None or self._video.previous is None:
            raise ValueError("state: expected a frame to be tracked before, got none")
        video, index = self._video, self._video.previous.index
        return {"made_with": self._made_with(video, index), "video": video.state(self._video.previous)}

    def _made_with(self, video: _Video, frame_index: int) -> dict[str, Any]:
        """All that the results up to a frame depend on, but the frames."""
        kept = video.bank.rule.kept
        return {
            "memory": str(self.memory),
            "remembered frames": sorted(kept) if isinstance(kept, frozenset) else None,
            "size": self.size,
            "device budget": self.budget.device,
            "host budget": self.budget.host,
            "eviction": self.budget.eviction,
            "memory share": self.budget.share,
            "skip_uncertain": self.skip_uncertain,
            "dtype": str(next(self.model.parameters()).dtype),
            "compiled": self.compiled,
            **self.read_options,
            "weights": self._weights_digest,
            "masks": array_digest({index: mask for index, mask in video.masks.items() if index <= frame_index}),
        }

    @cached_property
    def _weights_digest(self) -> str:
        return array_digest(self.model.state_dict())

    def plan(self, frame_size: tuple[int, int], frame_count: int, masks: Mapping[int, np.ndarray]) -> MemoryPlan:
        """What tracking a video will remember at most, before it is tracked.

        Args:
            frame_size: height and width of its frames.
            frame_count: their number.
            masks: as in `track`.

        Raises:
            ValueError: the budget does not hold the frames with a given mask and the previous one.
        """
        height, width = (side + -side % STRIDE for side in scaled_size(frame_size, self.size))
        config, dtype = self.model.config, next(self.model.parameters()).dtype

        def position_bytes(objects: int) -> int:
            keys = 1 if self.model.shares_keys else objects
            return (keys * config.key_channels + objects * config.value_channels) * dtype.itemsize

        return plan_memory(self._rule(frame_count), self.budget, masks, frame_count, (height, width), position_bytes)

    def _rule(self, frame_count: int | None) -> MemoryRule:
        return MemoryRule.parse(self.memory, frame_count) if isinstance(self.memory, str) else self.memory

    def _track(self, frames: Iterable[np.ndarray], video: _Video) -> Iterator[FrameResult]:
        before = video.previous
        index, done = -1, -1 if before is None else before.index
        for index, frame in enumerate(frames):
            if before is not None and index == done and not np.array_equal(frame, before.frame):
                raise ValueError(f"frames: frame {index} is not the one that the state was made at")
            if index <= done:
                continue
            before = None
            # entered and left for every frame: a generator must not hold the mode while its caller runs
            with torch.inference_mode():
                result = video.step(index, check_frame(frame, index, video.frame_size))
            yield result
        if index < max(done, 0):
            raise ValueError(f"frames: expected at least {'one' if done < 0 else done + 1}, got {index + 1 or 'none'}")
        late = sorted(mask_index for mask_index in video.masks if mask_index > index)
        if late:
            warnings.warn(f"masks of frames {late} were not used: the video ended at frame {index}", stacklevel=2)


@dataclass(frozen=True)
class _Previous:
    """The frame that was segmented last."""

    index: int
    frame: np.ndarray
    """uint8 `[H, W, 3]`, as it was given."""
    image: Tensor
    """float32 `[1, 3, h, w]`, as the network sees it, not padded."""
    probabilities: Tensor
    """`[n + 1, h, w]`, background first."""
    given: frozenset[int]
    """Labels of the objects whose mask the user gave."""
    certainty: list[float]
    """Of each object."""
    query: Query | None
    """What was computed of the frame alone, if it was segmented and its key is shared."""


class _Video:
    """The state of one video being tracked; `shorter_side` is that of the network's frames, None the video's own."""

    def __init__(
        self, model: STM, bank: MemoryBank, masks: dict[int, np.ndarray], shorter_side: int | None, skip_uncertain: bool
    ):
        self.model, self.bank, self.masks, self.skip_uncertain = model, bank, masks, skip_uncertain
        self.shorter_side, self.device = shorter_side, next(model.parameters()).device
        self.objects: list[int] = []
        self.previous: _Previous | None = None

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """Height and width of the frames, once one is known."""
        return None if self.previous is None else self.previous.frame.shape[:2]

    def state(self, previous: _Previous) -> dict[str, Any]:
        """All that going on after the last frame needs; what is remembered as `PagedMemory.state`."""
        return {
            "index": previous.index,
            "frame": torch.from_numpy(np.ascontiguousarray(previous.frame)),
            "probabilities": previous.probabilities,
            "given": sorted(previous.given),
            "certainty": previous.certainty,
            "objects": list(self.objects),
            "bank": self.bank.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Be where another one was at its `state`."""
        frame = state["frame"].numpy()
        image = prepare_frame(frame, scaled_size(frame.shape[:2], self.shorter_side), self.device)
        probabilities = state["probabilities"].to(self.device, copy=True)
        given, certainty = frozenset(state["given"]), list(state["certainty"])
        self.previous = _Previous(state["index"], frame, image, probabilities, given, certainty, None)
        self.objects = list(state["objects"])
        self.bank.load_state(state["bank"], self.device)

    def step(self, index: int, frame: np.ndarray) -> FrameResult:
        """Segment the next frame."""
        frame_size, mask = frame.shape[:2], self.masks.get(index)
        if mask is not None and mask.shape != frame_size:
            raise ValueError(
                f"mask of frame {index}: expected [H, W] = {list(frame_size)} like its frame, got {list(mask.shape)}"
            )
        size = scaled_size(frame_size, self.shorter_side)
        image = prepare_frame(frame, size, self.device)
        query, probabilities, familiarity = self._segment(image)
        given: frozenset[int] = frozenset()
        if mask is not None:
            # of the mask as given: an object too small for the network's size is still an object
            given = frozenset(objects_in(mask))
            probabilities = self._apply_mask(probabilities, prepare_mask(mask, size, self.device), given)
        # max, not argmax, which takes ten times as long over a strided axis on a CPU
        most, winners = probabilities.max(0)
        certainty = _certainty(most, winners, len(self.objects))
        encoded = query if self.model.shares_keys else None
        self.previous = _Previous(index, frame, image, probabilities, given, certainty, encoded)
        full = probabilities
        if size != frame_size:
            full = F.interpolate(full[None], frame_size, mode="bilinear", align_corners=False)[0]
            winners = full.max(0).indices
        values = torch.tensor([0, *self.objects], dtype=torch.uint8, device=self.device)
        labels = values[winners].cpu().numpy()
        if mask is not None and size != frame_size:
            # a given mask comes back exactly as it was given, though the network saw it resized
            objects = sorted(given)
            labels = np.where(np.isin(labels, objects) & (mask != VOID), 0, labels)
            labels = np.where(np.isin(mask, objects), mask, labels)
        familiarity += [-math.inf] * (len(self.objects) - len(familiarity))
        return FrameResult(index, labels, full, tuple(self.objects), tuple(certainty), tuple(familiarity))

    def _segment(self, image: Tensor) -> tuple[Query | None, Tensor, list[float]]:
        """The query of a frame, probabilities `[n + 1, h, w]` of the objects known so far, and their familiarity."""
        if not self.objects or self.previous is None:
            return None, torch.ones(1, *image.shape[-2:], device=self.device), []
        masks = pad_to_stride(self.previous.probabilities[1:])[0]
        others = other_object_masks(masks)
        self._remember(self.previous, masks, others)
        padded, (top, left) = pad_to_stride(image)
        query = self.model.encode_query(padded)
        readout, similarity = self.bank.read(query.key)
        objects = self.model.segment(readout, query, [len(self.objects)], (masks, others))
        # of the padded frame, whose cells are whole
        cells = F.avg_pool2d(objects, STRIDE)
        familiarity = ((cells * similarity).sum((1, 2)) / cells.sum((1, 2)).clamp(min=1e-12)).tolist()
        height, width = image.shape[-2:]
        found = objects[:, top : top + height, left : left + width]
        return query, torch.softmax(soft_aggregate(found), 0), familiarity

    def _remember(self, previous: _Previous, masks: Tensor, others: Tensor) -> None:
        """Put the previous frame, with its soft masks `[n, H, W]`, into the memories that want it."""
        given = [label in previous.given for label in self.objects]
        certain = [not self.skip_uncertain or value >= UNCERTAIN for value in previous.certainty]
        entries = self.bank.wanted(previous.index, given, certain)
        if not entries:
            return
        frame = pad_to_stride(previous.image)[0] if previous.query is None else previous.query
        key, value = self.model.memorize(frame, masks, others, [len(masks)])
        self.bank.remember(previous.index, entries, key, value)

    def _apply_mask(self, probabilities: Tensor, labels: Tensor, given: frozenset[int]) -> Tensor:
        """Overwrite predictions by a given mask and take in new objects; void pixels keep their prediction."""
        new = sorted(given - set(self.objects))
        if new:
            self.objects += new
            self.bank.add_objects(len(new))
            absent = torch.zeros(len(new), *probabilities.shape[1:], device=self.device)
            probabilities = torch.cat([probabilities, absent])
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


def _certainty(most: Tensor, winners: Tensor, count: int) -> list[float]:
    """The mean probability of each object over the pixels where it is the most probable.

    Args:
        most: `[h, w]`, the largest probability of each pixel.
        winners: `[h, w]`, its channel; that of the first object is 1.
        count: number of objects.
    """
    found = [most[winners == channel] for channel in range(1, count + 1)]
    return [values.mean().item() if len(values) else 0.0 for values in found]
