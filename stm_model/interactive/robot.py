"""The robot, DAVIS' simulated annotator: it scribbles on the errors of a segmentation."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path

from stm_model.interactive.scribbles import SMOOTH_POINTS, bezier

OPENING, MAX_OPENING = 0.15, 16
"""Error regions are opened by a disk: its diameter as a share of the root of the region's area, and its largest radius
in pixels."""
SHRINKING = 0.9
"""Factor by which the disk shrinks where the opening leaves nothing."""
MIN_PIXELS = 4
"""Smaller components of a skeleton are not scribbled."""


def robot_scribbles(prediction: np.ndarray, truth: np.ndarray, objects: Collection[int]) -> list[dict[str, Any]]:
    """Scribbles on the errors of a frame's segmentation, labels `[H, W]`, by ascending label; none if no error is
    large.

    Each label's missing region, background included, is opened by a disk and thinned to its medial axis; the longest
    path in each component of the axis, smoothed, is a scribble. Truth that is neither 0 nor an object's is no error.

    Source: Caelles et al. 2018, the DAVIS interactive track; interactive.davischallenge.org.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.ndim != 2 or prediction.shape != truth.shape:
        raise ValueError(
            f"prediction: expected labels {list(truth.shape)} like the truth, got {list(prediction.shape)}"
        )
    height, width = truth.shape
    scribbles = []
    for label in sorted({0, *objects}):
        missing = (truth == label) & (prediction != label)
        for path in _strokes(missing):
            curve = bezier(path[:, ::-1].astype(np.float64), SMOOTH_POINTS) / (width, height)
            scribbles.append({"path": curve.tolist(), "object_id": int(label)})
    return scribbles


def first_frame(truths: Sequence[np.ndarray], objects: Collection[int]) -> int:
    """The frame that shows the most objects, and those largest: a person would begin there."""

    def visible(index: int) -> tuple[int, int]:
        areas = [int(np.count_nonzero(truths[index] == label)) for label in objects]
        return sum(area > 0 for area in areas), sum(areas)

    return max(range(len(truths)), key=visible)


def medial_axis(mask: np.ndarray) -> np.ndarray:
    """The center lines of a mask, running into its corners: bool `[H, W]`, a subset with as many components.

    Pixels are removed in order of their distance to the background, corners after sides; a pixel stays if it connects
    its neighbors or ends a line.

    Source: Blum 1967; thinned by distance as Pudney 1998.
    """
    padded = np.pad(mask, 1)
    distance = ndimage.distance_transform_edt(padded).ravel()
    inside = np.flatnonzero(padded)
    neighbors = ndimage.convolve(padded.astype(np.int16), np.ones((3, 3), np.int16), mode="constant").ravel()
    order = inside[np.lexsort((inside, -neighbors[inside], distance[inside]))]
    stride = padded.shape[1]
    removable = _removable_codes()
    left = bytearray(padded.astype(np.uint8).tobytes())
    for place in order.tolist():
        up, down = place - stride, place + stride
        code = (
            left[up - 1]
            | left[up] << 1
            | left[up + 1] << 2
            | left[place + 1] << 3
            | left[down + 1] << 4
            | left[down] << 5
            | left[down - 1] << 6
            | left[place - 1] << 7
        )
        if removable[code]:
            left[place] = 0
    return np.frombuffer(left, dtype=np.uint8).reshape(padded.shape)[1:-1, 1:-1].astype(bool)


def _removable_codes() -> list[bool]:
    """For each set of neighbors, one bit each, clockwise from the upper left: whether the pixel may be removed."""
    codes = np.arange(256)[:, None] >> np.arange(8) & 1
    ring = codes.astype(bool)
    corner, side = ring[:, 0::2], ring[:, 1::2]
    # components of the foreground around the pixel, counted where one begins: clockwise after a background side
    following = np.roll(corner, -1, 1) | np.roll(side, -1, 1)
    components = (~side & following).sum(1)
    count = ring.sum(1)
    return ((components == 1) & (count > 1) & ~side.all(1)).tolist()


def _strokes(region: np.ndarray) -> list[np.ndarray]:
    """The longest path, rows and columns `[n, 2]`, in each component of a region's medial axis."""
    if not region.any():
        return []
    labels, count = ndimage.label(medial_axis(_opened(region)), np.ones((3, 3)))
    components = [np.argwhere(labels == n) for n in range(1, count + 1)]
    return [_longest_path(pixels) for pixels in components if len(pixels) >= MIN_PIXELS]


def _opened(region: np.ndarray) -> np.ndarray:
    """A region opened by a disk, the largest one that leaves something."""
    radius = min(OPENING * np.sqrt(np.count_nonzero(region)) / 2, MAX_OPENING)
    # distance to the nearest pixel outside the region; the region continues beyond the picture
    inside = ndimage.distance_transform_edt(region) if not region.all() else np.full(region.shape, np.inf)
    while radius > 1:
        core = inside > radius
        if core.any():
            return ndimage.distance_transform_edt(~core) <= radius
        radius *= SHRINKING
    return region


def _longest_path(pixels: np.ndarray) -> np.ndarray:
    """The longest of the shortest paths between two pixels of a connected skeleton `[n, 2]`: `[m, 2]`, in order."""
    index = {tuple(pixel): number for number, pixel in enumerate(pixels.tolist())}
    edges = [
        (number, index[neighbor])
        for (row, column), number in index.items()
        for neighbor in ((row, column + 1), (row + 1, column - 1), (row + 1, column), (row + 1, column + 1))
        if neighbor in index
    ]
    starts, ends = np.array(edges).T
    graph = coo_array((np.ones(len(edges)), (starts, ends)), shape=(len(pixels), len(pixels))).tocsr()

    def distances(start: int) -> tuple[np.ndarray, np.ndarray]:
        return shortest_path(graph, directed=False, unweighted=True, indices=start, return_predecessors=True)

    # the pixel farthest from any other ends a longest path; exactly so where there are no loops
    first = int(distances(0)[0].argmax())
    lengths, before = distances(first)
    path = [int(lengths.argmax())]
    while path[-1] != first:
        path.append(int(before[path[-1]]))
    return pixels[path]
