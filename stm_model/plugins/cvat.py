"""CVAT's tracking function: its agent follows masks and polygons of a job from frame to frame.

    cvat-cli function create-native STM --function-module stm_model.plugins.cvat
    cvat-cli function run-agent ID --function-module stm_model.plugins.cvat

Parameters of `create` are given as `-p checkpoint=str:FILE`. Source of the protocol: `cvat_sdk.auto_annotation`, 2.42
and newer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from cvat_sdk import auto_annotation as cvataa
from cvat_sdk.masks import decode_mask, encode_mask

from stm_model.io.formats.polygons import one_polygon_of_all, parts_of
from stm_model.io.formats.rle import decode_segmentation
from stm_model.network import STM
from stm_model.runtime import chosen_side
from stm_model.tracking.budget import MemoryBudget
from stm_model.tracking.result import FrameResult
from stm_model.tracking.session import TrackingSession
from stm_model.tracking.tracker import Tracker

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_OBJECTS = 254


class Scene:
    """The objects that were drawn on one picture, which are told apart by being followed together."""

    def __init__(self, session: TrackingSession, picture: np.ndarray):
        self.session, self.picture = session, picture
        self.result: FrameResult = session.step(picture)

    def add(self, mask: np.ndarray) -> int:
        """Follow one more object, drawn as bool `[H, W]`; its label."""
        label = len(self.session.objects) + 1
        if label > MAX_OBJECTS:
            raise ValueError(f"shapes: expected at most {MAX_OBJECTS} on a picture")
        self.result = self.session.add_object(label, mask)
        return label

    def mask(self, picture: np.ndarray, label: int) -> np.ndarray:
        """Where an object is in a picture: the same one again, or the next."""
        if picture is not self.picture:
            self.result, self.picture = self.session.step(picture), picture
        return self.result.labels == label


@dataclass(frozen=True)
class Followed:
    """The state of a shape."""

    scene: Scene
    label: int


class TrackingFunction:
    """Follows shapes by a network that is guided by masks.

    All shapes of one request are objects of one tracker, so a picture is encoded once for all of them.

    Args:
        tracker, checkpoint: the tracker, and where its weights are from.
        size: shorter side in pixels at which the network runs; None is that of the weights.
    """

    spec = cvataa.TrackingFunctionSpec(supported_shape_types=["mask", "polygon"])

    def __init__(self, tracker: Tracker, checkpoint: Path | None = None, size: int | None = None):
        self.tracker, self.checkpoint, self.size = tracker, checkpoint, size
        self._drawn: Scene | None = None

    def preprocess_image(self, context: cvataa.TrackingFunctionContext, image: Image) -> np.ndarray:
        """A picture as uint8 `[H, W, 3]`."""
        return np.array(image.convert("RGB"))

    def init_tracking_state(
        self, context: cvataa.TrackingFunctionShapeContext, pp_image: np.ndarray, shape: cvataa.TrackableShape
    ) -> Followed:
        """Follow a shape that was drawn on a picture. Raises a ValueError if it is empty or not within the picture."""
        mask = _drawn(shape, pp_image.shape[:2])
        if self._drawn is None or self._drawn.picture is not pp_image:
            self.tracker.size = chosen_side(self.size, self.checkpoint, pp_image.shape[:2], {0: mask.astype(np.uint8)})
            self._drawn = Scene(self.tracker.start(), pp_image)
        return Followed(self._drawn, self._drawn.add(mask))

    def track(
        self, context: cvataa.TrackingFunctionShapeContext, pp_image: np.ndarray, state: Followed
    ) -> cvataa.TrackableShape | None:
        """Where a shape is in the next picture, None where it is not to be seen."""
        mask = state.scene.mask(pp_image, state.label)
        if not mask.any():
            return None
        if context.original_shape_type == "mask":
            return cvataa.TrackableShape(type="mask", points=encode_mask(mask))
        corners = one_polygon_of_all(parts_of(mask)).astype(float)
        # a polygon has three corners at least
        corners = np.concatenate([corners, corners[-1:].repeat(max(0, 3 - len(corners)), 0)])
        return cvataa.TrackableShape(type="polygon", points=corners.ravel().tolist())


def create(
    checkpoint: str | None = None,
    size: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    budget_mib: int = 256,
) -> TrackingFunction:
    """What `cvat-cli function run-agent` runs.

    Args:
        checkpoint: weights, None for those in the package.
        size: shorter side in pixels at which the network runs; None is that of the weights.
        device: where to run, None for the GPU if there is one.
        dtype: number format, as in `STM.load`.
        budget_mib: MiB that each set of shapes may remember.
    """
    budget = MemoryBudget(device=budget_mib * 2**20)
    path = None if checkpoint is None else Path(checkpoint)
    return TrackingFunction(Tracker(STM.load(path, device=device, dtype=dtype), budget=budget), path, size)


def _drawn(shape: cvataa.TrackableShape, size: tuple[int, int]) -> np.ndarray:
    """A shape as bool `[H, W]`."""
    if shape.type == "mask":
        return decode_mask(shape.points, image_height=size[0], image_width=size[1])
    return decode_segmentation([list(shape.points)], size)
