"""What tracking finds in a frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from supervision import Detections


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
    """How sure the network is of each object: the mean of its probabilities weighted by themselves, which what it half
    believes lowers, wherever that is; 0 where it labels no pixel so."""
    familiarity: tuple[float, ...] = ()
    """How like what is remembered the picture looks where each object is: the logarithm of the mean exponential
    similarity that the memory read finds there; -inf before anything is remembered."""
    trust: tuple[float, ...] = ()
    """How far each mask can be trusted, 0 to 1: its certainty times how well it agrees with those before, see
    `stm_model.tracking.trust.agreement_of`. Below `UNTRUSTED` the object is likely lost; a given mask is certain."""

    def detections(self) -> Detections:
        """The objects in the frame as supervision's `Detections`: masks, boxes, the certainty as `confidence`, labels
        as `class_id` and `tracker_id`. Raises ImportError without the extra `[supervision]`.
        """
        from stm_model.io.formats.detections import detections_of

        return detections_of(self.labels, dict(zip(self.objects, self.certainty)))
