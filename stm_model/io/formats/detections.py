"""The objects of a frame as supervision's `Detections`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stm_model.io.formats.export import object_name

if TYPE_CHECKING:
    from supervision import Detections


def detections_of(labels: np.ndarray, certainty: dict[int, float]) -> Detections:
    """What is in labels uint8 `[H, W]`, with the certainty of each object; see `FrameResult.detections`."""
    try:
        import supervision
    except ImportError as error:
        raise ImportError(
            "detections: needs supervision, which is not installed: pip install 'stm-kernels[supervision]'"
        ) from error
    present: Sequence[int] = [label for label in certainty if (labels == label).any()]
    if not present:
        return supervision.Detections.empty()
    masks = np.stack([labels == label for label in present])
    return supervision.Detections(
        xyxy=supervision.mask_to_xyxy(masks).astype(np.float32),
        mask=masks,
        confidence=np.array([certainty[label] for label in present], dtype=np.float32),
        class_id=np.array(present),
        tracker_id=np.array(present),
        data={"class_name": np.array([object_name(label) for label in present])},
    )
