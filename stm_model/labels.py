"""What the values of a label map mean: 0 is background, 255 void, every other value an object."""

import numpy as np

VOID = 255
"""The label of pixels of which nothing is known: neither scored nor learned from."""


def objects_in(labels: np.ndarray) -> set[int]:
    """The labels of the objects in a mask."""
    return set(np.unique(labels).tolist()) - {0, VOID}


def smallest_share(labels: np.ndarray) -> float:
    """The share of a frame that the smallest object in its mask fills; 1 without an object."""
    counts = np.bincount(labels.ravel(), minlength=VOID + 1)[1:VOID]
    return float(counts[counts > 0].min(initial=labels.size) / labels.size)
