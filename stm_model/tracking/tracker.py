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
from stm_model.labels import VOID, by, check_frame, check_mask, objects_in
from stm_model.network import STM, STRIDE, Query, compile_parts, fold_batch_norm, other_object_masks, soft_aggregate
from stm_model.tracking.budget import MemoryBudget
from stm_model.tracking.memory import MemoryBank, MemoryRule
from stm_model.tracking.plan import MemoryPlan, plan_memory
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
        if size is not None and size < STRIDE:
            raise ValueError(f"size: expected at least {STRIDE} pixels, got {size}")
        self.read_options: dict[str, Any] = {
            "similarity": model.config.similarity,
            "top_k": top_k,
            "skip": skip,
            "implementation": implementation,
        }
        # a setting that makes no sense is refused here, not at the second frame
        memory_read(*torch.zeros(3, 1, 0, 1), **self.read_options)
        self.model, self.memory, self.size = fold_batch_norm(model), memory, size
        if compiled:
            self.model = compile_parts(self.model)
        self.compiled = compiled
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
            resume: what `checkpoint` returned, to go on from there: the frames before it are passed over, the results
                after it are, on a CPU to the bit, those of a run that was never stopped.

        Yields:
            A result for every frame, in order. Before the first mask everything is background.

        Raises:
            ValueError: there are no frames; a frame or mask has the wrong form; no mask names an object; a setting, the
                weights, the masks or the frames are not those that the checkpoint was made with.
        """
        if frame_count is None and isinstance(frames, Sized):
            frame_count = len(frames)
        rule = MemoryRule.parse(self.memory, frame_count) if isinstance(self.memory, str) else self.memory
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

    def checkpoint(self) -> dict[str, Any]:
        """All that `track` needs to go on after the result that it gave last, for `torch.save`.

        What is remembered is not copied: write it before asking for the next result.

        Raises:
            ValueError: no frame is tracked yet.
        """
        if self._video is None or self._video.previous is None:
            raise ValueError("checkpoint: expected a frame to be tracked before, got none")
        index, _, probabilities, given = self._video.previous
        return {
            "made_with": self._made_with(self._video, index),
            "video": {"index": index, "probabilities": probabilities, "given": sorted(given)} | self._video.state(),
        }

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
        rule = MemoryRule.parse(self.memory, frame_count) if isinstance(self.memory, str) else self.memory
        height, width = (side + -side % STRIDE for side in network_size(frame_size, self.size))
        config, dtype = self.model.config, next(self.model.parameters()).dtype

        def position_bytes(objects: int) -> int:
            keys = 1 if self.model.shares_keys else objects
            return (keys * config.key_channels + objects * config.value_channels) * dtype.itemsize

        return plan_memory(rule, self.budget, masks, frame_count, (height, width), position_bytes)

    def _track(self, frames: Iterable[np.ndarray], video: _Video) -> Iterator[FrameResult]:
        index, done = -1, -1 if video.previous is None else video.previous[0]
        for index, frame in enumerate(frames):
            if index == done and not np.array_equal(frame, video.frame):
                raise ValueError(f"frames: frame {index} is not the one that the checkpoint was made at")
            if index <= done:
                continue
            # entered and left for every frame: a generator must not hold the mode while its caller runs
            with torch.inference_mode():
                result = video.step(index, check_frame(frame, index, video.frame_size))
            yield result
        if index < max(done, 0):
            raise ValueError(f"frames: expected at least {'one' if done < 0 else done + 1}, got {index + 1 or 'none'}")
        late = sorted(mask_index for mask_index in video.masks if mask_index > index)
        if late:
            warnings.warn(f"masks of frames {late} were not used: the video ended at frame {index}", stacklevel=2)


class _Video:
    """The state of one video being tracked."""

    def __init__(
        self, model: STM, bank: MemoryBank, masks: dict[int, np.ndarray], size: int | None, skip_uncertain: bool
    ):
        self.model, self.masks, self.size, self.skip_uncertain = model, masks, size, skip_uncertain
        self.device = next(model.parameters()).device
        self.frame_size: tuple[int, int] | None = None
        self.objects: list[int] = []
        self.bank = bank
        self.previous: tuple[int, Tensor, Tensor, set[int]] | None = None
        # what was computed of the previous frame alone, if it was segmented
        self.query: Query | None = None
        # the last one
        self.frame = np.empty((0, 0, 3), np.uint8)
        # of the objects segmented in the last frame
        self.familiarity: list[float] = []
        self.certainty: list[float] = []

    def state(self) -> dict[str, Any]:
        """All but `previous` that going on after the last frame needs, as `PagedMemory.state`."""
        return {
            "frame": torch.from_numpy(np.ascontiguousarray(self.frame)),
            "objects": list(self.objects),
            "familiarity": list(self.familiarity),
            "certainty": list(self.certainty),
            "bank": self.bank.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Be where another one was at its `state`."""
        self.frame = state["frame"].numpy()
        self.frame_size = self.frame.shape[:2]
        probabilities = state["probabilities"].to(self.device, copy=True)
        self.previous = (state["index"], self._prepare(self.frame), probabilities, set(state["given"]))
        self.objects, self.familiarity, self.certainty = (
            list(state[name]) for name in ("objects", "familiarity", "certainty")
        )
        self.bank.load_state(state["bank"], self.device)

    def step(self, index: int, frame: np.ndarray) -> FrameResult:
        """Segment the next frame."""
        self.frame, self.frame_size, mask = frame, frame.shape[:2], self.masks.get(index)
        if mask is not None and mask.shape != self.frame_size:
            raise ValueError(
                f"mask of frame {index}: expected {by(self.frame_size)} pixels (height×width) like its frame, "
                f"got {by(mask.shape)}"
            )
        image = self._prepare(frame)
        probabilities = self._segment(image)
        given: set[int] = set()
        if mask is not None:
            # of the mask as given: an object too small for the network's size is still an object
            given = objects_in(mask)
            probabilities = self._apply_mask(probabilities, self._resize_mask(mask), given)
        self.certainty = _certainty(probabilities)
        self.previous = (index, image, probabilities, given)
        full = probabilities
        if full.shape[-2:] != self.frame_size:
            full = F.interpolate(full[None], self.frame_size, mode="bilinear", align_corners=False)[0]
        values = torch.tensor([0, *self.objects], dtype=torch.uint8, device=self.device)
        # max, not argmax, which takes ten times as long over a strided axis on a CPU
        labels = values[full.max(0).indices].cpu().numpy()
        if mask is not None and mask.shape != image.shape[-2:]:
            # a given mask comes back exactly as it was given, though the network saw it resized
            objects = sorted(given)
            labels = np.where(np.isin(labels, objects) & (mask != VOID), 0, labels)
            labels = np.where(np.isin(mask, objects), mask, labels)
        entered = [-math.inf] * (len(self.objects) - len(self.familiarity))
        familiarity = (*self.familiarity, *entered)
        return FrameResult(index, labels, full, tuple(self.objects), tuple(self.certainty), familiarity)

    def _prepare(self, frame: np.ndarray) -> Tensor:
        """uint8 `[H, W, 3]` → float32 `[1, 3, h, w]` in 0…1 at the network's size, not yet padded."""
        pixels = torch.from_numpy(np.ascontiguousarray(frame)).to(self.device)
        # plain order here, so that the weights alone decide the memory format of the convolutions
        image = pixels.permute(2, 0, 1)[None].contiguous().float() / 255
        size = network_size(frame.shape[:2], self.size)
        if size != image.shape[-2:]:
            image = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True).clamp_(0, 1)
        return image

    def _resize_mask(self, mask: np.ndarray) -> Tensor:
        labels = torch.from_numpy(np.ascontiguousarray(mask)).to(self.device)
        size = network_size(mask.shape, self.size)
        if size == mask.shape:
            return labels
        return F.interpolate(labels[None, None].float(), size, mode="nearest-exact")[0, 0].to(torch.uint8)

    def _segment(self, image: Tensor) -> Tensor:
        """Probabilities `[n + 1, h, w]` of the objects known so far."""
        if not self.objects:
            return torch.ones(1, *image.shape[-2:], device=self.device)
        assert self.previous is not None
        masks = pad_to_stride(self.previous[2][1:])[0]
        others = other_object_masks(masks)
        self._remember_previous(masks, others)
        padded, (top, left) = pad_to_stride(image)
        self.query = query = self.model.encode_query(padded)
        readout, similarity = self.bank.read(query.key)
        objects = self.model.segment(readout, query, [len(self.objects)], (masks, others))
        # of the padded frame, whose cells are whole
        places = F.avg_pool2d(objects, STRIDE)
        self.familiarity = ((places * similarity).sum((1, 2)) / places.sum((1, 2)).clamp(min=1e-12)).tolist()
        height, width = image.shape[-2:]
        return torch.softmax(soft_aggregate(objects[:, top : top + height, left : left + width]), 0)

    def _remember_previous(self, masks: Tensor, others: Tensor) -> None:
        """Put the previous frame, with its soft masks `[n, H, W]`, into the memories that want it."""
        assert self.previous is not None
        index, image, _, labels = self.previous
        given = [label in labels for label in self.objects]
        certain = [not self.skip_uncertain or value >= UNCERTAIN for value in self.certainty]
        wanted = self.bank.wanted(index, given, certain)
        if not any(wanted):
            return
        encoded = self.query if self.model.shares_keys else None
        frame = encoded if encoded is not None else pad_to_stride(image)[0]
        key, value = self.model.memorize(frame, masks, others, [len(masks)])
        self.bank.remember(index, given, certain, wanted, key, value)

    def _apply_mask(self, probabilities: Tensor, labels: Tensor, given: set[int]) -> Tensor:
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


def _certainty(probabilities: Tensor) -> list[float]:
    """The mean probability of each object over the pixels where it is the most probable, of `[n + 1, h, w]`."""
    most, winners = probabilities.max(0)
    found = [most[winners == channel] for channel in range(1, len(probabilities))]
    return [values.mean().item() if len(values) else 0.0 for values in found]


def network_size(frame_size: tuple[int, int], shorter_side: int | None) -> tuple[int, int]:
    """Height and width at which the network sees frames of a size, not yet padded."""
    height, width = frame_size
    if shorter_side is None:
        return height, width
    factor = shorter_side / min(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def pad_to_stride(maps: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Zero-pad `[…, H, W]` to multiples of 16 on both sides, the odd pixel below and right.

    Returns:
        The padded maps and the rows and columns added at the top and at the left.
    """
    rows, columns = (-maps.shape[-2]) % STRIDE, (-maps.shape[-1]) % STRIDE
    top, left = rows // 2, columns // 2
    return F.pad(maps, (left, columns - left, top, rows - top)), (top, left)
