"""Masks as polygons through the centres of their border pixels: drawn with their outline, they give the mask again."""

from typing import NamedTuple

import numpy as np

from stm_model.io.formats.export import box_of


class Part(NamedTuple):
    """A part of a mask: int corners `[n, 2]`, x and y, of the ring around it and of those around its holes."""

    outer: np.ndarray
    holes: list[np.ndarray]


def parts_of(mask: np.ndarray) -> list[Part]:
    """The parts of bool `[H, W]` that touch by sides, the largest first; a corner at every border pixel."""
    from contourpy import FillType, contour_generator

    if not mask.any():
        return []
    left, top, right, bottom = box_of(mask)
    padded = np.pad(mask[top:bottom, left:right], 1).astype(np.float64)
    # so close to 1 that every point of the contour rounds to the border pixel that it goes around
    generator = contour_generator(z=padded, fill_type=FillType.OuterOffset)
    found = []
    for points, offsets in zip(*generator.filled(0.9, 2.0)):
        corners = np.rint(points).astype(np.int64) + (left - 1, top - 1)
        rings = [_distinct(corners[start:end]) for start, end in zip(offsets[:-1], offsets[1:])]
        found.append(Part(rings[0], rings[1:]))
    return sorted(found, key=lambda part: -_pixels(part.outer))


def one_polygon(part: Part) -> np.ndarray:
    """A part as one polygon `[n, 2]`: its holes are cut in by lines that are walked there and back."""
    return _simple(_joined([part.outer, *part.holes], keep_all=True))


def one_polygon_of_all(parts: list[Part]) -> np.ndarray:
    """All parts as one polygon; those of fewer pixels than the line that would join them are left out."""
    rings = [_joined([part.outer, *part.holes], keep_all=True) for part in parts]
    return _simple(_joined(rings, keep_all=False))


def _distinct(ring: np.ndarray) -> np.ndarray:
    """A ring without its last corner, which is the first, and without repeated ones."""
    kept = ring[(ring != np.roll(ring, 1, axis=0)).any(1)]
    return kept if len(kept) else ring[:1]


def _pixels(ring: np.ndarray) -> float:
    """How many pixels are on a ring and inside, by Pick's theorem."""
    following = np.roll(ring, -1, axis=0)
    area = abs(float((ring[:, 0] * following[:, 1] - following[:, 0] * ring[:, 1]).sum())) / 2
    return area + len(ring) / 2 + 1


def _joined(rings: list[np.ndarray], keep_all: bool) -> np.ndarray:
    """Rings as one, from the first on always the nearest one next: no line crosses another ring."""
    from scipy.spatial import cKDTree

    path, rest = rings[0], dict(enumerate(rings[1:]))
    # of each: the distance to the path, the corner there and the place of its own
    nearest = dict.fromkeys(rest, (np.inf, path[0], 0))
    added = path
    while rest:
        tree = cKDTree(added)
        for key, ring in rest.items():
            distances, places = tree.query(ring)
            own = int(distances.argmin())
            if distances[own] < nearest[key][0]:
                nearest[key] = (float(distances[own]), added[places[own]], own)
        key = min(rest, key=lambda key: nearest[key][0])
        ring, (distance, corner, own) = rest.pop(key), nearest[key]
        added = np.roll(ring, -own, axis=0)
        if not keep_all and _pixels(ring) < distance:
            continue
        place = int((path == corner).all(1).argmax())
        path = np.concatenate([path[: place + 1], added, added[:1], path[place:]])
    return path


def _simple(ring: np.ndarray) -> np.ndarray:
    """A ring without the corners that lie on straight steps; at least three corners."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns = (before != after).any(1)
    kept = ring[turns]
    return kept if len(kept) >= 3 else np.resize(kept if len(kept) else ring, (3, 2))
