"""What scribbles say about a frame beyond what the network makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from stm_model.interactive.scribbles import NONE


def cross_out(probabilities: Tensor, drawing: np.ndarray, objects: Sequence[int]) -> Tensor:
    """Take from the objects of a frame the regions that are crossed out, and give them to what crosses them out.

    A connected region of an object is crossed out if scribbles of something else lie on it and none of the object's
    own, while another of its regions has some, or, where none has, another is larger. So the last region of an object
    stays, whatever lies on it: a scribble beside an outline may touch all there is of it.

    Args:
        probabilities: float `[n + 1, h, w]`, background first.
        drawing: int8 labels `[h, w]` of what is drawn on the frame, NONE where nothing is.
        objects: labels of the n objects.

    Returns:
        Other probabilities, `[n + 1, h, w]`.
    """
    labels = np.array([0, *objects])
    found = labels[probabilities.max(0).indices.cpu().numpy()]
    corrected = probabilities.clone()
    for channel, label in enumerate(objects, start=1):
        regions, count = ndimage.label(found == label)
        sizes = np.bincount(regions.ravel(), minlength=count + 1)
        own = np.bincount(regions[drawing == label], minlength=count + 1)
        # the pixels of no region are numbered 0
        sizes[0] = own[0] = 0
        crossed = (regions > 0) & (drawing != label) & (drawing != NONE)
        for region in np.unique(regions[crossed]):
            others_are_it = own.any() or (sizes > sizes[region]).any()
            if own[region] or not others_are_it:
                continue
            said, times = np.unique(drawing[crossed & (regions == region)], return_counts=True)
            target = int(np.flatnonzero(labels == said[times.argmax()])[0])
            inside = torch.from_numpy(regions == region)
            corrected[target, inside] += corrected[channel, inside]
            corrected[channel, inside] = 0
    return corrected
