"""Region similarity J and contour accuracy F, as the DAVIS 2017 evaluation defines them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stm_model.labels import VOID

BOUNDARY_TOLERANCE = 0.008  # of the image's diagonal
RECALL_THRESHOLD = 0.5
DECAY_PARTS = 4


class Statistics(NamedTuple):
    """Statistics of a measure over the frames of a sequence."""

    mean: float
    """Mean over the frames."""
    recall: float
    """Share of the frames that score more than 0.5."""
    decay: float
    """Mean of the first quarter of the frames minus that of the last; negative if it gets better with time."""


def statistics(values: Sequence[float]) -> Statistics:
    """Mean, recall and decay of a measure, for a sequence of any length.

    Args:
        values: the measure of one object, one value a frame, in order of time.

    Raises:
        ValueError: there are no values.

    Source: Perazzi et al., CVPR 2016, section 5; the quarters as in the DAVIS 2017 evaluation, where neighbours share
    a frame.
    """
    series = np.asarray(values, dtype=np.float64)
    if series.ndim != 1 or not len(series):
        raise ValueError(f"values: expected at least one value a frame, got shape {list(series.shape)}")
    # halves round up, as there
    bounds = np.floor(np.linspace(1, len(series), DECAY_PARTS + 1) + 0.5).astype(np.int64) - 1
    first, last = series[bounds[0] : bounds[1] + 1], series[bounds[-2] : bounds[-1] + 1]
    return Statistics(
        float(series.mean()), float((series > RECALL_THRESHOLD).mean()), float(first.mean() - last.mean())
    )


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
    box = _box_around(prediction, truth)
    contours = _contour(prediction[box]), _contour(truth[box])
    stride = contours[0].shape[1] + reach
    predicted, true = (_to_bits(contour, stride) for contour in contours)
    if not predicted or not true:
        return float(predicted == true)
    precision = (predicted & _dilate(true, reach, stride)).bit_count() / predicted.bit_count()
    recall = (true & _dilate(predicted, reach, stride)).bit_count() / true.bit_count()
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
        region, contour = zip(*(label_scores(predictions[t], truths[t], label) for t in frames))
        scores[int(label)] = (float(np.mean(region)), float(np.mean(contour)))
    return scores


def label_scores(prediction: np.ndarray, truth: np.ndarray, label: int) -> tuple[float, float]:
    """J and F of an object in labels uint8 `[H, W]`; 255 in the truth is void."""
    masks = prediction == label, truth == label, truth == VOID
    return region_similarity(*masks), contour_accuracy(*masks)


def _without_void(prediction: np.ndarray, truth: np.ndarray, void: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    named = {"prediction": prediction, "truth": truth} | ({} if void is None else {"void": np.asarray(void)})
    for name, mask in named.items():
        if mask.ndim != 2 or mask.dtype != bool:
            raise ValueError(f"{name}: expected a bool mask [H, W], got {mask.dtype} {list(mask.shape)}")
        if mask.shape != truth.shape:
            raise ValueError(f"{name}: expected the truth's shape {list(truth.shape)}, got {list(mask.shape)}")
    if void is None or not named["void"].any():
        return prediction, truth
    return prediction & ~named["void"], truth & ~named["void"]


def _box_around(first: np.ndarray, second: np.ndarray) -> tuple[slice, slice]:
    """The box around two masks and one pixel more on each side, which holds their contours."""
    rows = np.flatnonzero(first.any(1) | second.any(1))
    if not len(rows):
        return slice(0, 1), slice(0, 1)
    height = slice(max(rows[0] - 1, 0), rows[-1] + 2)
    columns = np.flatnonzero(first[height].any(0) | second[height].any(0))
    return height, slice(max(columns[0] - 1, 0), columns[-1] + 2)


def _contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower right neighbour; past its edge the mask goes on as it was."""
    contour = np.zeros_like(mask)
    contour[:, :-1] = mask[:, :-1] != mask[:, 1:]
    contour[:-1] |= mask[:-1] != mask[1:]
    contour[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return contour


def _to_bits(mask: np.ndarray, stride: int) -> int:
    """A mask as one whole number, a bit a pixel, row after row, each row padded with zeros to `stride` bits."""
    padded = np.zeros((mask.shape[0], stride), dtype=bool)
    padded[:, : mask.shape[1]] = mask
    return int.from_bytes(np.packbits(padded).tobytes(), "big")


def _dilate(bits: int, reach: int, stride: int) -> int:
    """A mask of `_to_bits` grown by a disk of radius `reach`; the padding of its rows must be as wide.

    A disk is a pile of rows: the mask grown sideways by each row's half width, moved up and down to the row's place.
    """
    grown, wide, half = 0, bits, 0
    for down in range(reach, -1, -1):
        while half < math.isqrt(reach**2 - down**2):
            half += 1
            wide |= bits << half | bits >> half
        grown |= wide << down * stride | wide >> down * stride
    return grown
