"""The measures of a mask."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.ndimage import binary_dilation

from stm_model.data.synthetic import procedural_clip
from stm_model.evaluation.metrics import contour_accuracy


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the next one to the right, below, or both; the mask goes on past its edge."""
    wide = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ wide[:-1, 1:]) | (mask ^ wide[1:, :-1]) | (mask ^ wide[1:, 1:])


def published_contour_accuracy(prediction: np.ndarray, truth: np.ndarray) -> float:
    """F by growing whole contours by a disk, as the measure is published (Perazzi et al., CVPR 2016)."""
    reach = math.ceil(0.008 * np.linalg.norm(truth.shape))
    offsets = np.arange(-reach, reach + 1)
    disk = offsets[:, None] ** 2 + offsets**2 <= reach**2
    predicted, true = contour(prediction), contour(truth)
    precision = (predicted & binary_dilation(true, disk)).sum() / predicted.sum()
    recall = (true & binary_dilation(predicted, disk)).sum() / true.sum()
    return 2 * precision * recall / (precision + recall)


def test_contour_accuracy(race: Callable) -> None:
    """F of a 480p mask against the one two frames later."""
    _, labels = procedural_clip(5, (480, 854), 2, seed=0)
    pairs = [(labels[index + 2] == 1, labels[index] == 1) for index in range(3)]
    for pair in pairs:
        assert abs(contour_accuracy(*pair) - published_contour_accuracy(*pair)) <= 1e-9
    race(
        lambda: [contour_accuracy(*pair) for pair in pairs],
        lambda: [published_contour_accuracy(*pair) for pair in pairs],
        9,
        20,
    )
