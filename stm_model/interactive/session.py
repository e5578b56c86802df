"""An interactive session: scribbles in, masks of the whole video out, in rounds; no user interface."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stm_model.interactive.blending import blend_weights, cross_out, mix
from stm_model.interactive.scribbles import check_scribbles, rasterize, scribble_maps
from stm_model.interactive.segmenter import Annotation, Memory, Segmenter
from stm_model.interactive.session_file import describe_video, read_session, write_session
from stm_model.interactive.state import MAX_NAME, NO_MASKS, FrameMasks, State, check_look, unpack_bits
from stm_model.io.images import label_colors
from stm_model.labels import objects_in
from stm_model.network import STM
from stm_model.tracking.tracker import Tracker

Progress = Callable[[int, int], Any]
"""Called with the frames done and the total. An exception it raises stops the work and leaves the session unchanged."""
Direction = Literal["both", "forward", "backward"]


class ScribbleSession:
    """Segments a video from scribbles, in rounds.

    Args:
        model: a network guided by scribbles.
        frames: the video, uint8 `[H, W, 3]`, all of one size; anything with a length and an index.
        size: shorter side in pixels at which the network runs; None keeps the frames' own.
        memory_limit: bytes for features of frames between rounds; beyond it they are computed again each round.

    Raises:
        ValueError: the network is guided by masks, there are no frames, or the size is too small.

    Source: Oh et al., A Unified Model for Semi-supervised and Interactive Video Object Segmentation using Space-time
    Memory Networks, DAVIS Challenge 2019, section 3.2.
    """

    def __init__(
        self, model: STM, frames: Sequence[np.ndarray], *, size: int | None = None, memory_limit: int = 2 * 2**30
    ):
        self._segmenter = Segmenter(model, frames, size, memory_limit)
        self.frames = frames
        self.frame_size, self.network_size = self._segmenter.frame_size, self._segmenter.size
        self._history, self._position = [State()], 0

    @property
    def state(self) -> State:
        """The present state."""
        return self._history[self._position]

    @property
    def objects(self) -> tuple[int, ...]:
        """Labels of the objects, in the order they were first drawn."""
        return self.state.objects

    @property
    def names(self) -> dict[int, str]:
        """What each object is called."""
        return {label: self.state.name(label) for label in self.objects}

    @property
    def palette(self) -> np.ndarray:
        """The color of each label, uint8 `[256, 3]`."""
        palette = label_colors()
        for label, color in self.state.colors.items():
            palette[label] = list(bytes.fromhex(color[1:]))
        return palette

    @property
    def certainty(self) -> list[float | None]:
        """How sure the network is of each frame's least certain object, 0 to 1; None where nothing was segmented."""
        masks = self.state.masks
        return [masks[index].certainty if index in masks else None for index in range(len(self.frames))]

    @property
    def rounds(self) -> int:
        """Rounds run."""
        return self.state.rounds

    @property
    def annotated_frames(self) -> tuple[int, ...]:
        """Frames with scribbles or painted masks; the memory holds these."""
        return self.state.annotated

    @property
    def encoded_frames(self) -> int:
        """How often a frame was encoded as a query."""
        return self._segmenter.encoded_frames

    @property
    def steps(self) -> tuple[tuple[str, ...], int]:
        """The name of each step, and the index of the present one."""
        return tuple(state.action for state in self._history), self._position

    def add_scribbles(self, frame_index: int, scribbles: Sequence[Mapping[str, Any]]) -> None:
        """Draw on a frame, without computing anything. A new label is a new object.

        Args:
            frame_index: the frame.
            scribbles: {"path": [[x, y], …] in 0…1, "object_id": label, 0 for background}, as in DAVIS' JSON.

        Raises:
            ValueError: no such frame, no scribbles, or invalid ones.
        """
        self._check_index(frame_index)
        check_scribbles(scribbles)
        if not scribbles:
            raise ValueError(f"scribbles of frame {frame_index}: expected at least one, got none")
        plain = tuple(
            {"path": np.asarray(scribble["path"], float).tolist(), "object_id": scribble["object_id"]}
            for scribble in scribbles
        )
        self._step(self.state.with_scribbles(frame_index, plain))

    def paint(self, frame_index: int, mask: np.ndarray, object_id: int = 1) -> None:
        """Set the mask of an object on a frame; it stays until scribbles correct it.

        Args:
            frame_index: the frame.
            mask: bool `[H, W]`, of the frame's size.
            object_id: label; a new one is a new object.

        Raises:
            ValueError: no such frame, another size or dtype, or an invalid label.
        """
        self._check_index(frame_index)
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape != tuple(self.frame_size):
            raise ValueError(f"mask: expected bool {list(self.frame_size)}, got {mask.dtype} {list(mask.shape)}")
        check_scribbles([{"path": [[0, 0]], "object_id": object_id}])
        if object_id == 0:
            raise ValueError("object_id: expected the label of an object, got 0, the background")
        self._step(self._painted(self.state, frame_index, object_id, mask))

    def give(self, masks: Mapping[int, np.ndarray], names: Mapping[int, str] | None = None) -> None:
        """Set the masks of all objects in label maps, as `paint` does, in one step.

        Args:
            masks: frame → uint8 `[H, W]` of the frame's size: 0 is what none of its objects is on, 255 is void.
            names: what to call objects that are new.

        Raises:
            ValueError: no such frame, no object, another size or dtype, or an invalid label.
        """
        state = self.state
        for index, labels in masks.items():
            self._check_index(index)
            if labels.dtype != np.uint8 or labels.shape != tuple(self.frame_size):
                expected = f"uint8 {list(self.frame_size)}, as the video"
                raise ValueError(f"mask of frame {index}: expected {expected}, got {labels.dtype} {list(labels.shape)}")
            for label in sorted(objects_in(labels)):
                check_scribbles([{"path": [[0, 0]], "object_id": label}])
                state = self._painted(state, index, label, labels == label)
        for label, name in (names or {}).items():
            if label in state.objects and label not in self.objects:
                check_look(state, label, name[:MAX_NAME], None)
                state = state.with_look(label, name[:MAX_NAME], None)
        if state is self.state:
            raise ValueError("masks: expected an object in one of them, got none")
        given = f"frame {next(iter(masks))}" if len(masks) == 1 else f"{len(masks)} frames"
        self._step(replace(state, action=f"masks of {given}"))

    def describe(self, object_id: int, name: str | None = None, color: str | None = None) -> None:
        """Give an object a name, which no other has, and a color, `#rrggbb`; None leaves it.

        Raises:
            ValueError: no such object, or not such a name or color.
        """
        check_look(self.state, object_id, name, color)
        self._step(self.state.with_look(object_id, name, color))

    def remove(self, object_id: int) -> None:
        """Delete an object: its scribbles and masks, on all frames. Raises a ValueError if there is no such object."""
        check_look(self.state, object_id, None, None)
        self._step(self.state.without(object_id))

    def run(self, progress: Progress | None = None) -> None:
        """Segment the video from all annotations: one round.

        Raises:
            ValueError: no object was drawn yet.
        """
        state, count = self.state, len(self.frames)
        memory = self._refined_memory(state)
        weights = np.ones(count)
        if state.fresh:
            weights = blend_weights(count, state.fresh, frozenset(state.annotated) - state.fresh)
        # frames that keep their masks are not segmented, unless an object enters
        asked = [
            index
            for index in range(count)
            if weights[index] > 0 or index not in state.masks or len(state.masks[index].objects) < len(state.objects)
        ]
        masks = dict(state.masks)
        for done, (index, new) in enumerate(self._segmenter.segment(memory, asked), start=1):
            masks[index] = self._settle(state, index, new, weights[index])
            if progress is not None:
                progress(done, len(asked))
        rounds = state.rounds + 1
        self._step(replace(state, action=f"round {rounds}", masks=masks, fresh=frozenset(), rounds=rounds))

    def preview(self, frame_index: int) -> np.ndarray:
        """Labels, uint8 `[H, W]`, that a round would give one frame; the session stays unchanged.

        Raises:
            ValueError: no such frame, or no object was drawn yet.
        """
        self._check_index(frame_index)
        state = self.state
        ((_, new),) = self._segmenter.segment(self._refined_memory(state), [frame_index])
        return self._labels(state, frame_index, self._settle(state, frame_index, new, 1.0))

    def track_from(
        self,
        frame_index: int,
        tracking_model: STM,
        direction: Direction = "both",
        progress: Progress | None = None,
    ) -> None:
        """Track the objects of one frame through the video with a network guided by masks.

        Masks of objects that are not on that frame stay where the tracked ones leave room.

        Args:
            frame_index: the frame, whose masks are right.
            tracking_model: a network guided by masks.
            direction: forward to the video's end, backward to its start, or both.
            progress: see `Progress`.

        Raises:
            ValueError: no such frame, no object on it, another direction, or a network guided by scribbles.
        """
        self._check_index(frame_index)
        ways = {"forward": [1], "backward": [-1], "both": [1, -1]}
        if direction not in ways:
            raise ValueError(f"direction: expected one of {', '.join(ways)}, got {direction!r}")
        state, labels = self.state, self.labels(frame_index)
        if not labels.any():
            raise ValueError(f"frame {frame_index}: expected an object to track, got an empty mask")
        tracker = Tracker(tracking_model, size=min(self.network_size))
        last = len(self.frames) - 1
        paths = [range(frame_index, last + 1) if way > 0 else range(frame_index, -1, -1) for way in ways[direction]]
        total, done, masks = sum(len(path) - 1 for path in paths), 0, dict(state.masks)
        for path in paths:
            results = tracker.track((np.array(self.frames[index]) for index in path), {0: labels}, len(path))
            for index, result in zip(path, results):
                if index == frame_index:
                    continue
                tracked = F.interpolate(result.probabilities[None].cpu(), self.network_size, mode="area")[0]
                masks[index] = state.masks.get(index, NO_MASKS).with_objects(result.objects, tracked[1:])
                done += 1
                if progress is not None:
                    progress(done, total)
        self._step(replace(state, action=f"tracked {direction} from frame {frame_index}", masks=masks))

    def labels(self, frame_index: int) -> np.ndarray:
        """Present labels of a frame, uint8 `[H, W]`."""
        self._check_index(frame_index)
        return self._labels(self.state, frame_index, self.state.masks.get(frame_index, NO_MASKS))

    def masks(self) -> np.ndarray:
        """Present labels of all frames, uint8 `[T, H, W]`."""
        return np.stack([self.labels(index) for index in range(len(self.frames))])

    def probabilities(self, frame_index: int) -> Tensor:
        """Probabilities of a frame at the network's size, float32 `[n + 1, h, w]`: background, then `objects`."""
        self._check_index(frame_index)
        return self.state.masks.get(frame_index, NO_MASKS).unpack(self.network_size, self.objects)

    def undo(self) -> None:
        """Undo the last step. Raises a ValueError if there is none."""
        if not self._position:
            raise ValueError("nothing to undo")
        self._position -= 1

    def redo(self) -> None:
        """Redo the last step undone. Raises a ValueError if there is none."""
        if self._position == len(self._history) - 1:
            raise ValueError("nothing to redo")
        self._position += 1

    def save(self, path: str | os.PathLike) -> None:
        """Write the session with all its steps to one file, whole or not at all."""
        write_session(path, describe_video(self.frames, self.network_size), self._history, self._position)

    def restore(self, path: str | os.PathLike) -> None:
        """Continue from a file of `save`, undo and redo included.

        Raises:
            SessionFileError: not a session, or one of another video or size; this session stays unchanged.
        """
        self._history, self._position = read_session(path, describe_video(self.frames, self.network_size))

    def _painted(self, state: State, index: int, label: int, mask: np.ndarray) -> State:
        """A state in which an object has this mask, bool `[H, W]`, on a frame."""
        painted = torch.from_numpy(mask)[None, None].float()
        if self.network_size != self.frame_size:
            painted = F.interpolate(painted, self.network_size, mode="bilinear", antialias=True)
        return state.with_paint(index, label, mask, painted[0, 0].clamp(0, 1))

    def _step(self, state: State) -> None:
        self._history = [*self._history[: self._position + 1], state]
        self._position += 1

    def _check_index(self, frame_index: int) -> None:
        if isinstance(frame_index, bool) or not isinstance(frame_index, (int, np.integer)):
            raise TypeError(f"frame_index: expected a whole number, got {frame_index!r}")
        if not 0 <= frame_index < len(self.frames):
            raise ValueError(f"frame_index: expected 0 to {len(self.frames) - 1}, got {frame_index}")

    def _remember(self, state: State) -> Memory:
        if not state.objects:
            raise ValueError("no object yet: draw a scribble on one first")
        return self._segmenter.remember([self._annotation(state, index) for index in state.annotated])

    def _refined_memory(self, state: State) -> Memory:
        """The memory, in which frames annotated since the last round have the masks that their scribbles give them.

        Masks tell other frames more about an object than scribbles do.
        """
        masks = dict(state.masks)
        for index, new in self._segmenter.segment(self._remember(state), sorted(state.fresh)):
            masks[index] = self._settle(state, index, new, 1.0)
        return self._remember(replace(state, masks=masks))

    def _annotation(self, state: State, index: int) -> Annotation:
        scribbles, masks = state.scribbles.get(index, ()), state.masks.get(index, NO_MASKS)
        drawing = rasterize(scribbles, self.network_size)
        positive, negative = (torch.from_numpy(maps) for maps in scribble_maps(drawing, state.objects))
        soft = masks.unpack(self.network_size, state.objects)[1:]
        soft[[channel for channel, label in enumerate(state.objects) if label not in masks.objects]] = 0.5
        known = tuple(label in masks.objects or bool((drawing == label).any()) for label in state.objects)
        paths = tuple((scribble["object_id"], str(scribble["path"])) for scribble in scribbles)
        return Annotation(index, soft, positive, negative, known, (state.objects, paths, masks))

    def _settle(self, state: State, index: int, new: Tensor, weight: float) -> FrameMasks:
        """A frame's masks after a round: scribbles cross out, earlier masks are mixed in, painted masks stay."""
        if index in state.scribbles:
            new = cross_out(new, rasterize(state.scribbles[index], self.network_size), state.objects)
        old = state.masks.get(index, NO_MASKS)
        if index in state.masks and weight < 1:
            entered = [channel for channel, label in enumerate(state.objects, start=1) if label not in old.objects]
            new = mix(new, old.unpack(self.network_size, state.objects), entered, weight)
        masks = FrameMasks.pack(state.objects, new[1:])
        if painted := tuple(state.painted.get(index, ())):
            masks = masks.with_objects(painted, old.unpack(self.network_size, painted)[1:])
        return masks

    def _labels(self, state: State, index: int, masks: FrameMasks) -> np.ndarray:
        probabilities = masks.unpack(self.network_size)
        if self.network_size != self.frame_size:
            probabilities = F.interpolate(probabilities[None], self.frame_size, mode="bilinear")[0]
        # max, not argmax, which takes ten times as long over a strided axis on a CPU
        labels = np.array([0, *masks.objects], dtype=np.uint8)[probabilities.max(0).indices.numpy()]
        for label, packed in state.painted.get(index, {}).items():
            painted = unpack_bits(packed, self.frame_size)
            labels[(labels == label) & ~painted] = 0
            labels[painted] = label
        return labels
