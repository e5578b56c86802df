"""Synthetic scribbles for training: a random walk on a region's skeleton, drawn with an unsteady hand."""

import numpy as np
import torch
from scipy import ndimage

from stm_model.interactive.scribbles import polyline, thin
from stm_model.labels import VOID

MAX_STROKES = 3
"""Strokes of one scribble: one for each of the region's largest components."""
MIN_COMPONENT = 0.05
"""Smaller components, as a share of the region, get no stroke, except the largest."""
MIN_LENGTH, MAX_LENGTH = 0.3, 1.0
"""Length of a stroke, as a share of its component's skeleton."""
POINT_SPACING = 8
"""Pixels between the points of a walk that are moved at random."""
NEAR = 0.15
"""Background is scribbled within this share of the picture's longer side from the objects."""
EROSION, MAX_EROSION = 0.15, 16
"""Errors are eroded before they are scribbled on, as the robot does: by this share of the root of their area, and by
at most so many pixels."""


def synthesize(mask: np.ndarray, random: torch.Generator) -> np.ndarray:
    """Scribble on a region, bool `[H, W]`, as a person might: a stroke along the middle of each of its larger
    components.

    Returns bool `[H, W]`, lines one pixel wide inside the region; empty only if the region is.

    Source: Oh et al., DAVIS challenge 2019: skeleton and random walk.
    """
    skeleton = thin(mask)
    scribble = np.zeros_like(skeleton)
    for component in _large_components(mask):
        box = ndimage.find_objects(component.astype(np.uint8))[0]
        scribble[box] |= _stroke(component[box], skeleton[box] & component[box], random)
    return scribble


def synthesize_background(objects: np.ndarray, random: torch.Generator) -> np.ndarray:
    """Scribble on the background near the objects, given the mask of all of them; see `synthesize`."""
    reach = NEAR * max(objects.shape)
    near = ndimage.distance_transform_edt(~objects) <= reach if objects.any() else np.ones_like(objects)
    # half of the ring around the objects: nobody scribbles all the way around
    rows, columns = np.indices(objects.shape, sparse=True)
    height, width = objects.shape
    angle = 2 * np.pi * float(torch.rand((), generator=random))
    pixels = np.argwhere(objects)
    center = pixels.mean(0) if len(pixels) else np.array([height / 2, width / 2])
    side = np.cos(angle) * (columns - center[1]) + np.sin(angle) * (rows - center[0]) > 0
    for region in (near & ~objects & side, near & ~objects, ~objects):
        if region.any():
            break
    return synthesize(region, random)


def corrective(
    prediction: np.ndarray, truth: np.ndarray, label: int, random: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Positive scribbles on false negatives of one object in labels `[H, W]` and negative ones on its false positives.

    Both bool `[H, W]`, empty where there is no error; void pixels of the truth are none.
    """
    missed = (truth == label) & (prediction != label)
    extra = (prediction == label) & (truth != label) & (truth != VOID)
    return synthesize(_core(missed), random), synthesize(_core(extra), random)


def _core(region: np.ndarray) -> np.ndarray:
    """An error without its border, unless nothing else is left: nobody scribbles on slightly wrong outlines."""
    border = min(EROSION * np.sqrt(np.count_nonzero(region)), MAX_EROSION)
    core = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1] > border
    return core if core.any() else region


def _large_components(mask: np.ndarray) -> list[np.ndarray]:
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    largest = np.argsort(-areas, kind="stable")[:MAX_STROKES]
    return [labels == 1 + n for n in largest if n == largest[0] or areas[n] >= MIN_COMPONENT * mask.sum()]


def _stroke(component: np.ndarray, skeleton: np.ndarray, random: torch.Generator) -> np.ndarray:
    """A walk on a component's skeleton, redrawn by hand."""
    # one walk may end early in a corner
    path = max((_walk(skeleton, random) for _ in range(2)), key=len)
    points = path[np.unique(np.append(np.arange(0, len(path), POINT_SPACING), len(path) - 1))]
    to_border = ndimage.distance_transform_cdt(np.pad(component, 1))[1:-1, 1:-1][tuple(points.T)]
    shake = float(torch.rand((), generator=random))
    moved = points + torch.randn(points.shape, generator=random).numpy() * (shake * to_border)[:, None]
    smooth = np.round(ndimage.gaussian_filter1d(moved, 1.0, axis=0, mode="nearest")).astype(np.int64)
    stroke = np.zeros_like(component)
    stroke[tuple(polyline(smooth.clip(0, np.array(component.shape) - 1)).T)] = True
    stroke &= component
    if not stroke.any():
        # the redrawn line left a narrow component everywhere
        stroke[tuple(path[len(path) // 2])] = True
    return stroke


def _walk(skeleton: np.ndarray, random: torch.Generator) -> np.ndarray:
    """A self-avoiding random walk on a skeleton, from a random pixel in two directions: `[n, 2]`."""
    stride = skeleton.shape[1] + 2
    pixels = np.flatnonzero(np.pad(skeleton, 1))
    start = int(pixels[int(torch.randint(len(pixels), (), generator=random))])
    share = MIN_LENGTH + (MAX_LENGTH - MIN_LENGTH) * float(torch.rand((), generator=random))
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
