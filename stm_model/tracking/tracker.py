"""Semi-supervised tracking: frames stream in, masks stream out; only the memory is kept."""

import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stm_kernels import memory_read
from stm_model.labels import objects_in
from stm_model.network import STM, STRIDE, for_inference
from stm_model.tracking.ahead import encoded_ahead, pays
from stm_model.tracking.bank import MemoryBank
from stm_model.tracking.both_ways import Backward, backwards
from stm_model.tracking.budget import MemoryBudget, MemoryPlan, MemoryRule, plan_memory
from stm_model.tracking.frames import (
    Frame,
    as_array,
    check_frame,
    check_index,
    check_mask,
    check_side,
    check_spacing,
    scaled_size,
)
from stm_model.tracking.result import FrameResult
from stm_model.tracking.resume import array_digest, check_same
from stm_model.tracking.session import TrackingSession


class Tracker:
    """Follows objects through a video from their masks in the first frame, or in later ones.

    Args:
        model: the network, of which a copy with batch norm folded is kept; its device and dtype are where and how
            tracking runs.
        memory: which frames are remembered: a `MemoryRule` or its name, see `MemoryRule.parse`; None is `first+every:5`
            for a network whose decoder sees the previous frame's masks, `every:5` for others.
        size: length in pixels of the shorter side that frames are resized to for the network; None keeps their own.
            Results always come at the frames' own size.
        budget: how much may be remembered; None keeps everything, on the host where the device is full.
        spacing: where a frame without a given mask has no object nearby, only every so many rows and columns of its
            positions are remembered, and count for the rest; 1 remembers all. None is 2 for a network whose decoder
            sees the previous frame's masks, without a budget, which would choose by use, else 1.
        skip_uncertain: don't keep frames for good in which an object of the memory is `UNTRUSTED`.
        compiled: compile encoders and decoder: some minutes before the first results, then less time a frame.
        ahead: take a frame before the result of the one in front of it is given, and encode it meanwhile in a second
            thread: on a CPU of several, whose waiting threads sleep (`OMP_WAIT_POLICY=PASSIVE`, as in `stm`), where the
            network is not compiled.
        top_k, skip, implementation: how the memory is read, see `stm_kernels.memory_read`.

    Raises:
        TypeError: the model is none, or the size or the spacing no number.
        ValueError: the rule, the size, the spacing or a setting of the read makes no sense, the network is guided by
            scribbles, or there is nothing to compile with.
    """

    def __init__(
        self,
        model: STM,
        *,
        memory: str | MemoryRule | None = None,
        size: int | None = None,
        budget: MemoryBudget | None = None,
        spacing: int | None = None,
        skip_uncertain: bool = False,
        compiled: bool = False,
        ahead: bool = False,
        top_k: int | None = None,
        skip: float = 0.0,
        implementation: str = "auto",
    ):
        if not isinstance(model, STM):
            raise TypeError(f"model: expected an STM, as STM.load gives it, got {type(model).__name__}")
        model.expect_guidance("masks")
        if memory is None:
            memory = "first+every:5" if model.config.prior else "every:5"
        if isinstance(memory, str):
            MemoryRule.parse(memory, frame_count=1)
        check_side(size)
        if spacing is not None:
            check_spacing(spacing)
        self.read_options: dict[str, Any] = {
            "similarity": model.config.similarity,
            "top_k": top_k,
            "skip": skip,
            "implementation": implementation,
        }
        # a setting that makes no sense is refused here, not at the second frame
        memory_read(*torch.zeros(3, 1, 0, 1), **self.read_options)
        self.model = for_inference(model, compiled)
        self.memory, self.size, self.compiled, self.ahead = memory, size, compiled, ahead
        self.budget, self.skip_uncertain, self._spacing = budget or MemoryBudget(), skip_uncertain, spacing
        self.bank: MemoryBank | None = None
        """The memory of the video that is tracked, or was last."""
        self._session: TrackingSession | None = None

    def track(
        self,
        frames: Iterable[Frame],
        masks: Mapping[int, np.ndarray | Tensor],
        frame_count: int | None = None,
        *,
        resume: Mapping[str, Any] | None = None,
        backward: Backward | None = None,
    ) -> Iterator[FrameResult]:
        """Segment a video frame by frame, as the frames come.

        Args:
            frames: RGB uint8 `[H, W, 3]`, all of one size; consumed one at a time. Arrays, PIL images or tensors; those
                on the network's device are not copied.
            masks: frame index → label map `[H, W]`: 0 says nothing, 1…254 are objects, 255 is void. A label that was
                not seen before is a new object; one that was replaces the prediction of that object.
            frame_count: number of frames, if known; only the rule `uniform:K` needs it.
            resume: what `state` returned, to go on from there: the frames before it are passed over, the results after
                it are, on a CPU to the bit, those of a run that was never stopped.
            backward: what `track_backward` found, to be mixed in.

        Yields:
            A result for every frame, in order. Before the first mask everything is background.

        Raises:
            TypeError: the masks are no mapping.
            ValueError: there are no frames; a frame or mask has the wrong form; a mask is for no frame; none names an
                object; a setting, the weights, the masks or the frames are not those that the state was made with.
        """
        if frame_count is None and isinstance(frames, Sized):
            frame_count = len(frames)
        session = self._begin(masks, frame_count, backward)
        if not any(objects_in(mask) for mask in session.masks.values()):
            raise ValueError("masks: expected at least one labelled object (1…254), got none")
        if resume is not None:
            check_same(resume["made_with"], self._made_with(session, resume["video"]["index"]))
            session.load_state(resume["video"])
        self.bank, self._session = session.bank, session
        return self._track(frames, session)

    def start(
        self, masks: Mapping[int, np.ndarray | Tensor] | None = None, frame_count: int | None = None
    ) -> TrackingSession:
        """Begin a video whose frames are given one by one: `session.step(frame)`.

        Args:
            masks: as in `track`; None begins without objects, `session.add_object` takes them in.
            frame_count: as in `track`.

        Raises:
            ValueError: a mask has the wrong form or is for no frame, or the rule needs the number of frames.
        """
        self._session = self._begin({} if masks is None else masks, frame_count)
        self.bank = self._session.bank
        return self._session

    def track_both_ways(
        self, frames: Iterable[Frame], masks: Mapping[int, np.ndarray | Tensor]
    ) -> Iterator[FrameResult]:
        """Segment a video from masks of any of its frames: backwards first, then forwards, the two mixed.

        Between two given masks of an object both ways count, each the more the nearer its mask is and the surer it is
        of the object; what is remembered for the frames after them is the mixture. Before an object's first mask it is
        what was tracked backwards.

        Args:
            frames: as in `track`, each of which can be had at any time: a list, an array, or what `open_video` gives.
            masks: as in `track`. The pass backwards begins at the last of them.

        Yields:
            A result for every frame, in order, once the pass backwards is done. Its soft masks are in a temporary
            folder until the last result.

        Raises:
            TypeError, ValueError: as `track`.
        """
        count = len(frames) if isinstance(frames, Sized) else getattr(frames, "frame_count", None)
        given = self._begin(masks, count).masks
        with tempfile.TemporaryDirectory() as folder:
            backward = Backward(Path(folder), given)
            for _ in self.track_backward(frames, backward):
                pass
            yield from self.track(frames, given, count, backward=backward)

    def track_backward(
        self, frames: Any, backward: Backward, *, resume: Mapping[str, Any] | None = None
    ) -> Iterator[int]:
        """Track backwards from the last given mask and keep what is found for `track`; yields each frame's index.

        For the arguments see `track_both_ways` and `track`; without a mask after the first frame nothing is to do.
        """
        if not backward.start:
            return
        source = backwards(frames, backward.start)
        for result in self.track(source, backward.mirrored, backward.start + 1, resume=resume):
            assert self._session is not None and self._session.previous is not None
            index = backward.start - result.index
            masks = dict(zip(result.objects, self._session.previous.probabilities[1:]))
            backward.write(index, masks, result.certainty)
            yield index

    def _begin(
        self,
        masks: Mapping[int, np.ndarray | Tensor],
        frame_count: int | None,
        backward: Backward | None = None,
    ) -> TrackingSession:
        if not isinstance(masks, Mapping):
            raise TypeError(f"masks: expected label maps by frame number, as {{0: mask}}, got {type(masks).__name__}")
        checked = {check_index(index, frame_count or None): check_mask(mask, index) for index, mask in masks.items()}
        bank = MemoryBank(self._rule(frame_count), self.budget, self.spacing, **self.read_options)
        return TrackingSession(self.model, bank, checked, self.size, self.skip_uncertain, backward)

    def state(self) -> dict[str, Any]:
        """All that `track` needs to go on after the result that it gave last, for `torch.save`.

        What is remembered is not copied: write it before asking for the next result.

        Raises:
            ValueError: no frame is tracked yet.
        """
        if self._session is None or self._session.previous is None:
            raise ValueError("state: expected a frame to be tracked before, got none")
        session, index = self._session, self._session.previous.index
        return {"made_with": self._made_with(session, index), "video": session.state()}

    def _made_with(self, session: TrackingSession, frame_index: int) -> dict[str, Any]:
        """All that the results up to a frame depend on, but the frames."""
        kept = session.bank.rule.kept
        # what was tracked backwards depends on later masks
        last = frame_index if session.backward is None else math.inf
        return {
            "memory": str(self.memory),
            "remembered frames": sorted(kept) if isinstance(kept, frozenset) else None,
            "size": self.size,
            "device budget": self.budget.device,
            "host budget": self.budget.host,
            "eviction": self.budget.eviction,
            "memory share": self.budget.share,
            "spacing": self.spacing,
            "skip_uncertain": self.skip_uncertain,
            "dtype": self.model.dtype_name,
            "compiled": self.compiled,
            **self.read_options,
            "weights": self._weights_digest,
            "both ways": session.backward is not None,
            "masks": array_digest({index: mask for index, mask in session.masks.items() if index <= last}),
        }

    @cached_property
    def _weights_digest(self) -> str:
        return array_digest(self.model.state_dict())

    @property
    def spacing(self) -> int:
        """Rows and columns between the positions that are remembered where no object is near."""
        if self._spacing is not None:
            return self._spacing
        limited = self.budget.total is not None or self.budget.share is not None
        return 2 if self.model.config.prior and not limited else 1

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
            key_channels = config.key_channels + (self.spacing > 1)
            return (keys * key_channels + objects * config.value_channels) * dtype.itemsize

        return plan_memory(self._rule(frame_count), self.budget, masks, frame_count, (height, width), position_bytes)

    def _rule(self, frame_count: int | None) -> MemoryRule:
        return MemoryRule.parse(self.memory, frame_count) if isinstance(self.memory, str) else self.memory

    def _track(self, frames: Iterable[Frame], session: TrackingSession) -> Iterator[FrameResult]:
        before = session.previous
        index, done = -1, -1 if before is None else before.index
        # the first frame with a mask is encoded with it
        first = max(min(session.masks), done) + 1
        ahead = self.ahead and not self.compiled and pays(session.device)
        each = encoded_ahead(frames, session.encode, first) if ahead else ((frame, None) for frame in frames)
        for index, (frame, encoded) in enumerate(each):
            made_at = as_array(before.frame) if before is not None and index == done else None
            if made_at is not None and not np.array_equal(made_at, as_array(check_frame(frame, index, None))):
                raise ValueError(f"frames: frame {index} is not the one that the state was made at")
            if index <= done:
                continue
            before = None
            yield session.step(frame, encoded)
        if index < max(done, 0):
            raise ValueError(f"frames: expected at least {'one' if done < 0 else done + 1}, got {index + 1 or 'none'}")
        late = sorted(mask_index for mask_index in session.masks if mask_index > index)
        if late:
            warnings.warn(f"masks of frames {late} were not used: the video ended at frame {index}", stacklevel=2)
