"""Scribbles made up from masks, to train on: a random walk on a region's skeleton, drawn with an unsteady hand."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from stm_model.interactive.scribbles import polyline, thin
from stm_model.io.images import VOID

MOST_STROKES = 3
"""Strokes of one scribble: at most so many pieces of a region get one."""
LEAST_PIECE = 0.05
"""Pieces smaller than this share of their region get no stroke, but for the largest."""
LONGEST, SHORTEST = 1.0, 0.3
"""Length of a stroke, as a share of its piece's skeleton."""
HAND = 8
"""Pixels between the points that a hand is led through."""
NEAR = 0.15
"""Background is scribbled within this share of the picture's longer side from the objects."""
ERODED = 0.15
"""Errors lose a border of this share of the root of their area before they are scribbled on, as the robot does it."""
WIDEST_BORDER = 16
"""The most they lose, in pixels."""


def synthesize(mask: np.ndarray, random: torch.Generator) -> np.ndarray:
    """Scribble on a region as a person might: a stroke along the middle of each of its larger pieces.

    Args:
        mask: the region, bool `[H, W]`.
        random: where chance comes from.

    Returns:
        bool `[H, W]`, lines one pixel wide that lie in the region; empty only if it is.

    Raises:
        ValueError: not such a mask.

    Source: Oh et al., DAVIS challenge 2019: skeleton and random walk.
    """
    skeleton = thin(mask)
    scribble = np.zeros_like(skeleton)
    for piece in _large_pieces(mask):
        box = ndimage.find_objects(piece.astype(np.uint8))[0]
        scribble[box] |= _stroke(piece[box], skeleton[box] & piece[box], random)
    return scribble


def synthesize_background(objects: np.ndarray, random: torch.Generator) -> np.ndarray:
    """Scribble on the background near the objects; for the arguments and the result see `synthesize`.

    Args:
        objects: the mask of all objects.
        random: where chance comes from.
    """
    reach = NEAR * max(objects.shape)
    near = ndimage.distance_transform_edt(~objects) <= reach if objects.any() else np.ones_like(objects)
    # a part of the ring around the objects: a whole one would be scribbled all around
    rows, columns = np.indices(objects.shape, sparse=True)
    height, width = objects.shape
    angle = 2 * np.pi * float(torch.rand((), generator=random))
    places = np.argwhere(objects)
    centre = places.mean(0) if len(places) else np.array([height / 2, width / 2])
    side = np.cos(angle) * (columns - centre[1]) + np.sin(angle) * (rows - centre[0]) > 0
    for region in (near & ~objects & side, near & ~objects, ~objects):
        if region.any():
            break
    return synthesize(region, random)


def corrective(
    prediction: np.ndarray, truth: np.ndarray, label: int, random: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Scribble on what a prediction got wrong about an object.

    Args:
        prediction: labels `[H, W]`.
        truth: labels `[H, W]`; where it is 255 nothing is wrong.
        label: the object.
        random: where chance comes from.

    Returns:
        Positive scribbles where it was missed and negative ones where it is not, bool `[H, W]`; empty where nothing is
        wrong.
    """
    missed = (truth == label) & (prediction != label)
    extra = (prediction == label) & (truth != label) & (truth != VOID)
    return synthesize(_core(missed), random), synthesize(_core(extra), random)


def _core(region: np.ndarray) -> np.ndarray:
    """An error without what a border that is slightly off leaves; all of it, if nothing else is there."""
    border = min(ERODED * np.sqrt(np.count_nonzero(region)), WIDEST_BORDER)
    core = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1] > border
    return core if core.any() else region


def _large_pieces(mask: np.ndarray) -> list[np.ndarray]:
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    largest = np.argsort(-areas, kind="stable")[:MOST_STROKES]
    return [labels == 1 + piece for piece in largest if piece == largest[0] or areas[piece] >= LEAST_PIECE * mask.sum()]


def _stroke(piece: np.ndarray, skeleton: np.ndarray, random: torch.Generator) -> np.ndarray:
    """A walk on the skeleton of a connected piece, redrawn by hand."""
    # a walk may end soon in a corner
    path = max((_walk(skeleton, random) for _ in range(2)), key=len)
    points = path[np.unique(np.append(np.arange(0, len(path), HAND), len(path) - 1))]
    room = ndimage.distance_transform_cdt(np.pad(piece, 1))[1:-1, 1:-1][tuple(points.T)]
    shake = float(torch.rand((), generator=random))
    moved = points + torch.randn(points.shape, generator=random).numpy() * (shake * room)[:, None]
    smooth = np.round(ndimage.gaussian_filter1d(moved, 1.0, axis=0, mode="nearest")).astype(np.int64)
    stroke = np.zeros_like(piece)
    stroke[tuple(polyline(smooth.clip(0, np.array(piece.shape) - 1)).T)] = True
    stroke &= piece
    if not stroke.any():
        # the hand left a narrow piece everywhere
        stroke[tuple(path[len(path) // 2])] = True
    return stroke


def _walk(skeleton: np.ndarray, random: torch.Generator) -> np.ndarray:
    """A random walk on a skeleton that visits no pixel twice, from a random pixel in two directions: `[n, 2]`."""
    stride = skeleton.shape[1] + 2
    pixels = np.flatnonzero(np.pad(skeleton, 1))
    start = int(pixels[int(torch.randint(len(pixels), (), generator=random))])
    share = SHORTEST + (LONGEST - SHORTEST) * float(torch.rand((), generator=random))
    draws = torch.rand(2, len(pixels), generator=random).tolist()
    steps = (-1, 1, -stride, stride, -stride - 1, -stride + 1, stride - 1, stride + 1)
    left, halves = set(pixels.tolist()) - {start}, []
    for half in draws:
        here, visited = start, []
        for draw in half[: int(share * len(pixels) / 2) + 1]:
            near = [here + step for step in steps if here + step in left]
            if not near:
                break
            here = near[int(draw * len(near))]
            left.discard(here)
            visited.append(here)
        halves.append(visited)
    path = np.array([*halves[0][::-1], start, *halves[1]])
    return np.stack(np.divmod(path, stride), 1) - 1
