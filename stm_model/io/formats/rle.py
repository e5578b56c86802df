"""Masks as COCO's run lengths and polygons, by pycocotools."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Bool `[H, W]` as COCO's compressed run lengths, ready for JSON."""
    from pycocotools import mask as coco

    runs = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode()}


def decode_segmentation(segmentation: list | dict, size: tuple[int, int]) -> np.ndarray:
    """An instance's mask, bool `[H, W]` of `size`, from polygons or run lengths, as COCO's own tools draw it.

    Raises a ValueError where the run lengths are not those of this image, or a polygon is none.
    """
    # only here: most training data needs none of it
    from pycocotools import mask as coco

    height, width = size
    if not isinstance(segmentation, dict):
        runs = coco.merge(coco.frPyObjects([_corners(polygon, size) for polygon in segmentation], height, width))
        return coco.decode(runs).astype(bool)
    if tuple(segmentation["size"]) != size:
        raise ValueError(f"size: expected the image's {list(size)}, got {segmentation['size']}")
    counts = segmentation["counts"]
    # pycocotools checks neither: it leaves pixels that no run covers as they were in memory
    if isinstance(counts, str):
        mask = coco.decode(segmentation)
        if coco.encode(np.asfortranarray(mask))["counts"] != counts.encode():
            raise ValueError(f"run lengths: expected COCO's string for {height}·{width} pixels")
        return mask.astype(bool)
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(f"run lengths: expected a sum of {height}·{width} pixels, got {sum(counts)}")
    return coco.decode(coco.frPyObjects(segmentation, height, width)).astype(bool)


def _corners(polygon: Sequence[float], size: tuple[int, int]) -> list[float]:
    """Corners x₀, y₀, x₁, y₁, … of a polygon that is worth drawing."""
    corners = np.asarray(polygon, dtype=np.float64)
    if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2:
        raise ValueError(f"polygon: expected x and y of at least 3 corners, got shape {list(corners.shape)}")
    # pycocotools walks along every edge, however far from the image
    if not (np.abs(corners) <= 10 * max(size)).all():
        raise ValueError(f"polygon: expected corners in an image of {size[0]}·{size[1]} pixels, got {polygon[:6]} …")
    return corners.tolist()
