"""How far an object can be from one frame to the next: where several look alike, parts of one are found on another.

Networks whose decoder sees the previous masks are held back alone; what a released STM finds stays as it is.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

REACH = 0.12
"""Part of the frame's shorter side within which an object is expected of where it was in the previous frame."""
OUT_OF_REACH = 0.1
"""What the odds of an object are multiplied by outside, where another object is expected."""
SEEN = 0.5
"""Probability above which an object was in a cell."""
FAINT = 0.01
"""Less of an object in a cell is left as it is."""


def hold_back(objects: Tensor, found: Tensor, previous: Tensor) -> Tensor:
    """Lower the odds of objects out of their reach, where another one is within its own.

    Objects that were nowhere to be seen may come back anywhere.

    Args:
        objects: `[n, H, W]` float32, the probability of each object by itself.
        found: `[n, h, w]`, its mean over each cell of the network's grid.
        previous: `[n, h, w]`, the greatest probability in each cell in the previous frame.

    Returns:
        Probabilities like `objects`; these themselves where nothing was out of reach.
    """
    side = max(1, round(REACH * min(previous.shape[-2:])))
    seen = (previous > SEEN).float()
    reach = F.max_pool2d(seen[None], 2 * side + 1, stride=1, padding=side)[0]
    outside = (reach == 0) & (reach.amax(0) > 0) & (seen.amax((1, 2)) > 0)[:, None, None]
    places = (outside & (found > FAINT)).flatten(1).any(1).nonzero()[:, 0]
    if not len(places):
        return objects
    factor = torch.where(outside[places], OUT_OF_REACH, 1.0)[None]
    factor = F.interpolate(factor, objects.shape[-2:], mode="bilinear", align_corners=False)[0]
    likely = objects[places] * factor
    return objects.index_copy(0, places, likely / (1 - objects[places] + likely))
