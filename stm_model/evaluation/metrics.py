"""Region similarity J and contour accuracy F, as the DAVIS 2017 evaluation defines them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.ndimage import distance_transform_edt

VOID = 255
BOUNDARY_TOLERANCE = 0.008  # of the image's diagonal


def region_similarity(prediction: np.ndarray, truth: np.ndarray, void: np.ndarray | None = None) -> float:
    """The intersection of two masks over their union, J; 1 for two empty masks.

    Args:
        prediction: bool `[H, W]`.
        truth: bool `[H, W]`.
        void: bool `[H, W]`, pixels that count for neither; None is no pixel.

    Returns:
        J, from 0 to 1.

    Raises:
        ValueError: not masks, or of different shapes.

    Source: Perazzi et al., CVPR 2016, section 4.
    """
    prediction, truth = _without_void(prediction, truth, void)
    union = np.count_nonzero(prediction | truth)
    return np.count_nonzero(prediction & truth) / union if union else 1.0


def contour_accuracy(prediction: np.ndarray, truth: np.ndarray, void: np.ndarray | None = None) -> float:
    """The harmonic mean of the precision and recall of a mask's contour, F; 1 for two masks without a contour.

    A contour pixel is matched if the other contour comes within ceil(0.008 · diagonal) pixels of it.

    Args:
        prediction: bool `[H, W]`.
        truth: bool `[H, W]`.
        void: bool `[H, W]`, pixels taken out of both masks; None is no pixel.

    Returns:
        F, from 0 to 1.

    Raises:
        ValueError: not masks, or of different shapes.

    Source: Perazzi et al., CVPR 2016, section 4; the DAVIS 2017 evaluation.
    """
    prediction, truth = _without_void(prediction, truth, void)
    reach = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*truth.shape))
    predicted, true = _contour(prediction), _contour(truth)
    if not predicted.any() or not true.any():
        return float(predicted.any() == true.any())
    # beyond the box around both contours there is nothing to match
    box = _bounding_box(predicted | true)
    predicted, true = predicted[box], true[box]
    precision = _share_near(predicted, true, reach)
    recall = _share_near(true, predicted, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def sequence_scores(
    predictions: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    objects: Sequence[int] | None = None,
    *,
    skip_ends: bool = True,
) -> dict[int, tuple[float, float]]:
    """The mean J and F of every object over a sequence.

    Args:
        predictions: uint8 labels `[H, W]`, one a frame.
        truths: uint8 labels `[H, W]`, one a frame; 255 is void.
        objects: labels to score; None is every label of the first truth but 0 and 255.
        skip_ends: leave out the first frame (its mask was given) and the last one, as DAVIS does.

    Returns:
        (mean J, mean F) by label.

    Raises:
        ValueError: the lengths differ, no frame is left to score, or no object.
    """
    if len(predictions) != len(truths):
        raise ValueError(f"predictions and truths: expected one each a frame, got {len(predictions)} and {len(truths)}")
    frames = range(1, len(truths) - 1) if skip_ends else range(len(truths))
    if not frames:
        raise ValueError(f"truths: expected at least {3 if skip_ends else 1} frames, got {len(truths)}")
    if objects is None:
        objects = [int(label) for label in np.unique(truths[0]) if label not in (0, VOID)]
    if not objects:
        raise ValueError("objects: expected at least one label to score, got none")
    scores = {}
    for label in objects:
        pairs = [(predictions[t] == label, truths[t] == label, truths[t] == VOID) for t in frames]
        region = np.mean([region_similarity(*pair) for pair in pairs])
        contour = np.mean([contour_accuracy(*pair) for pair in pairs])
        scores[int(label)] = (float(region), float(contour))
    return scores


def _without_void(prediction: np.ndarray, truth: np.ndarray, void: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    void = np.zeros(truth.shape, dtype=bool) if void is None else np.asarray(void)
    for name, mask in (("prediction", prediction), ("truth", truth), ("void", void)):
        if mask.ndim != 2 or mask.dtype != bool:
            raise ValueError(f"{name}: expected a bool mask [H, W], got {mask.dtype} {list(mask.shape)}")
        if mask.shape != truth.shape:
            raise ValueError(f"{name}: expected the truth's shape {list(truth.shape)}, got {list(mask.shape)}")
    return prediction & ~void, truth & ~void


def _contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower right neighbour; past its edge the mask goes on as it was."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def _bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _share_near(points: np.ndarray, others: np.ndarray, reach: int) -> float:
    """The share of `points` that have one of `others` within `reach` pixels."""
    distance = distance_transform_edt(~others)
    return np.count_nonzero(distance[points] <= reach) / np.count_nonzero(points)
