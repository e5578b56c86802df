"""The robot: it looks for what a segmentation got wrong and scribbles there, as DAVIS' simulated annotator does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import shortest_path

from stm_model.interactive.scribbles import SMOOTH_POINTS, bezier

OPENING = 0.15
"""Diameter of the disk that rounds an error region, as a share of the root of the region's area."""
WIDEST_OPENING = 16
"""Greatest radius of that disk, in pixels."""
SHRINKING = 0.9
"""By how much the disk shrinks where nothing is left of a region."""
LEAST_PIXELS = 4
"""Pieces of a skeleton with fewer pixels are not scribbled."""


def robot_scribbles(prediction: np.ndarray, truth: np.ndarray, objects: Collection[int]) -> list[dict[str, Any]]:
    """Scribble on what a segmentation got wrong in a frame.

    Each label's missing region, that of the background among them, is opened by a disk and thinned to its medial axis;
    the longest path in each piece of that, smoothed, is a scribble.

    Args:
        prediction: labels `[H, W]`.
        truth: labels `[H, W]`; where it holds none of the objects and not 0, nothing is wrong.
        objects: the labels that may be scribbled besides 0.

    Returns:
        Scribbles as in a scribble file, by ascending label; none where nothing larger than a few pixels is wrong.

    Raises:
        ValueError: the shapes differ.

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
            scribbles.append(
                {"path": curve.tolist(), "object_id": int(label), "start_time": 0, "end_time": 0},
            )
    return scribbles


def first_frame(truths: Sequence[np.ndarray], objects: Collection[int]) -> int:
    """The frame that shows the objects best: most of them, and those largest. There a person would begin."""

    def shown(index: int) -> tuple[int, int]:
        areas = [np.count_nonzero(truths[index] == label) for label in objects]
        return np.count_nonzero(areas), sum(areas)

    return max(range(len(truths)), key=shown)


def worst_frame(
    scores: Mapping[int, float], used: Collection[int] = (), candidates: Collection[int] | None = None
) -> int:
    """The frame that the robot scribbles on next: that of the lowest score, the earliest of several.

    Args:
        scores: frame → how well it is segmented.
        used: frames that were scribbled on before; they are taken again only when there are no others.
        candidates: the frames to choose among; None is all.

    Raises:
        ValueError: no candidate has a score.
    """
    allowed = [frame for frame in sorted(scores) if candidates is None or frame in candidates]
    if not allowed:
        raise ValueError(f"candidates: expected frames that have a score, got {sorted(candidates or ())}")
    return min([frame for frame in allowed if frame not in used] or allowed, key=scores.__getitem__)


def medial_axis(mask: np.ndarray) -> np.ndarray:
    """The lines in the middle of a mask: it is thinned from outside to inside, into its corners lines remain.

    Pixels go in order of their distance to the outside, corners after sides; one stays if it joins what its neighbours
    leave apart, or ends a line.

    Args:
        mask: bool `[H, W]`; what is outside the picture is background.

    Returns:
        bool `[H, W]`, a part of the mask with as many pieces as it.

    Source: Blum 1967; thinned by distance as Pudney 1998.
    """
    padded = np.pad(mask, 1)
    distance = ndimage.distance_transform_edt(padded).ravel()
    inside = np.flatnonzero(padded)
    neighbours = ndimage.convolve(padded.astype(np.int16), np.ones((3, 3), np.int16), mode="constant").ravel()
    order = inside[np.lexsort((inside, -neighbours[inside], distance[inside]))]
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
    """For each set of neighbours, a bit each clockwise from the upper left: whether the pixel between them may go."""
    codes = np.arange(256)[:, None] >> np.arange(8) & 1
    ring = codes.astype(bool)
    corner, side = ring[:, 0::2], ring[:, 1::2]
    # pieces of the foreground around a pixel, counted where one begins: a side neighbour that is background, and after
    # it, clockwise, one that is not
    following = np.roll(corner, -1, 1) | np.roll(side, -1, 1)
    pieces = (~side & following).sum(1)
    count = ring.sum(1)
    return ((pieces == 1) & (count > 1) & ~side.all(1)).tolist()


def _strokes(region: np.ndarray) -> list[np.ndarray]:
    """The longest path `[n, 2]`, rows and columns, in each piece of a region's medial axis."""
    if not region.any():
        return []
    labels, count = ndimage.label(medial_axis(_opened(region)), np.ones((3, 3)))
    pieces = [np.argwhere(labels == piece) for piece in range(1, count + 1)]
    return [_longest_path(piece) for piece in pieces if len(piece) >= LEAST_PIXELS]


def _opened(region: np.ndarray) -> np.ndarray:
    """A region without what is too narrow for a disk; the largest disk is taken that leaves something."""
    radius = min(OPENING * np.sqrt(np.count_nonzero(region)) / 2, WIDEST_OPENING)
    # distance to the nearest pixel that is not of the region; beyond the picture the region goes on
    inside = ndimage.distance_transform_edt(region) if not region.all() else np.full(region.shape, np.inf)
    while radius > 1:
        core = inside > radius
        if core.any():
            return ndimage.distance_transform_edt(~core) <= radius
        radius *= SHRINKING
    return region


def _longest_path(pixels: np.ndarray) -> np.ndarray:
    """The longest of the shortest ways between two pixels of a connected skeleton `[n, 2]`: `[m, 2]`, in order."""
    index = {tuple(pixel): number for number, pixel in enumerate(pixels.tolist())}
    edges = [
        (number, index[neighbour])
        for (row, column), number in index.items()
        for neighbour in ((row, column + 1), (row + 1, column - 1), (row + 1, column), (row + 1, column + 1))
        if neighbour in index
    ]
    starts, ends = np.array(edges).T
    graph = coo_array((np.ones(len(edges)), (starts, ends)), shape=(len(pixels), len(pixels))).tocsr()
    # what is farthest from any pixel ends a longest path; exactly so where there are no loops
    first = _reach(graph, 0)[0].argmax()
    lengths, before = _reach(graph, first)
    path = [lengths.argmax()]
    while path[-1] != first:
        path.append(before[path[-1]])
    return pixels[path]


def _reach(graph: csr_array, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps from a pixel to each, and the pixel before each on the way."""
    return shortest_path(graph, directed=False, unweighted=True, indices=start, return_predecessors=True)
