"""How a frame's new masks are combined with its scribbles and with its masks before."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from torch import Tensor

from stm_model.interactive.scribbles import NONE


def cross_out(probabilities: Tensor, drawing: np.ndarray, objects: Sequence[int]) -> Tensor:
    """Give regions of objects that are crossed out by scribbles to the label of these scribbles.

    A connected region of an object is crossed out if scribbles of other labels lie on it and none of the object's own,
    and the object is more likely elsewhere: it has own scribbles on another region or, if on none, a larger region. So
    an object never loses its last region: a scribble beside an outline may touch it.

    Args:
        probabilities: float `[n + 1, h, w]`, background first.
        drawing: int8 labels `[h, w]` of the frame's scribbles, NONE elsewhere.
        objects: labels of the n objects.
    """
    labels = np.array([0, *objects])
    found = labels[probabilities.max(0).indices.cpu().numpy()]
    corrected = probabilities.clone()
    for channel, label in enumerate(objects, start=1):
        regions, count = ndimage.label(found == label)
        sizes = np.bincount(regions.ravel(), minlength=count + 1)
        own = np.bincount(regions[drawing == label], minlength=count + 1)
        # number 0 is no region
        sizes[0] = own[0] = 0
        crossed = (regions > 0) & (drawing != label) & (drawing != NONE)
        for region in np.unique(regions[crossed]):
            likelier_elsewhere = own.any() or (sizes > sizes[region]).any()
            if own[region] or not likelier_elsewhere:
                continue
            inside = regions == region
            drawn, times = np.unique(drawing[crossed & inside], return_counts=True)
            target = int(np.flatnonzero(labels == drawn[times.argmax()])[0])
            corrected[target, inside] += corrected[channel, inside]
            corrected[channel, inside] = 0
    return corrected


def blend_weights(frame_count: int, fresh: frozenset[int], settled: frozenset[int]) -> np.ndarray:
    """Weight of a round's masks against the masks before it, for every frame, float64 `[T]` in 0…1.

    One at a frame annotated for this round (`fresh`), falling linearly to zero at the next frame on either side that
    was annotated for an earlier round (`settled`), and zero beyond; one up to the video's end if there is none.

    Source: Oh et al. 2019, Fast User-Guided Video Object Segmentation by Interaction-and-Propagation Networks.
    """
    weights = np.zeros(frame_count)
    times = np.arange(frame_count)
    for frame in fresh:
        after = min((other for other in settled if other > frame), default=np.inf)
        before = max((other for other in settled if other < frame), default=-np.inf)
        falling = np.where(times >= frame, (times - frame) / (after - frame), (frame - times) / (frame - before))
        weights = np.maximum(weights, 1 - np.clip(falling, 0, 1))
    return weights


def overwrite(probabilities: Tensor, channels: Sequence[int], given: Tensor) -> Tensor:
    """Set the masks of m objects to `given`, `[m, h, w]`; the others keep what these leave of each pixel.

    Where a replaced object was before, the result sums to less than one: the rest is background, see `FrameMasks.pack`.
    """
    result = probabilities * (1 - given.sum(0))
    result[channels] = given
    return result


def mix(new: Tensor, before: Tensor, entered: Sequence[int], weight: float) -> Tensor:
    """Weighted mean of new and earlier probabilities `[n + 1, h, w]`; objects that `entered` (channels) are all new."""
    return weight * new + (1 - weight) * overwrite(before, entered, new[entered])
