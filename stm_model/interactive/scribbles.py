"""Scribbles: read from DAVIS' JSON, checked, drawn, turned into the network's input maps; thinning of masks.

A scribble is a dict as in that JSON: `path`, points [x, y] from 0 (left, top) to 1 (right, bottom), and `object_id`,
its label, 0 for background.
"""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

Scribble = Mapping[str, Any]

NONE = -1
"""Label of a pixel without a scribble."""
MAX_LABEL = 127
"""Largest label: drawings are int8."""
SMOOTH_POINTS = 1000
"""Points sampled on a Bezier curve."""
DILATIONS = 2
"""Dilations of the network's scribbles by a 3×3 cross. Source: Oh et al., CVPR 2019."""


class ScribbleError(ValueError):
    """Invalid scribbles; the message says which, what was expected and what came."""


def read_scribbles(
    path: str | os.PathLike, frame_count: int | None = None, objects: Collection[int] | None = None
) -> dict[int, list[dict[str, Any]]]:
    """Read a scribble file of DAVIS' interactive challenge.

    Args:
        path: the JSON file: {"sequence": name, "scribbles": [the scribbles of each frame]}.
        frame_count: frames of the video; None allows any number.
        objects: labels allowed besides 0; None allows all up to 127.

    Returns:
        Frame index → its scribbles, for the frames that have any.

    Raises:
        ScribbleError: broken JSON, another structure or invalid scribbles; the message names the file.
        FileNotFoundError: there is no such file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ScribbleError(f"{path}: broken JSON ({error})") from error
    try:
        return parse_scribbles(content, frame_count, objects)
    except ScribbleError as error:
        raise ScribbleError(f"{path}: {error}") from error


def parse_scribbles(
    content: Any, frame_count: int | None = None, objects: Collection[int] | None = None
) -> dict[int, list[dict[str, Any]]]:
    """`read_scribbles` of parsed JSON."""
    frames = content.get("scribbles") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not all(isinstance(frame, list) for frame in frames):
        raise ScribbleError('expected {"sequence": name, "scribbles": [a list for each frame]}')
    given = {index: frame for index, frame in enumerate(frames) if frame}
    for index, frame in given.items():
        if frame_count is not None and index >= frame_count:
            raise ScribbleError(f"scribbles on frame {index}, but the video has {frame_count} frames")
        try:
            check_scribbles(frame, objects)
        except ScribbleError as error:
            raise ScribbleError(f"frame {index}, {error}") from error
    return given


def check_scribbles(scribbles: Sequence[Scribble], objects: Collection[int] | None = None) -> None:
    """Raise a ScribbleError for the first scribble of a frame that is invalid; for `objects` see `read_scribbles`."""
    for number, scribble in enumerate(scribbles):
        if not isinstance(scribble, Mapping) or not {"path", "object_id"} <= set(scribble):
            raise ScribbleError(f'scribble {number}: expected {{"path": [[x, y], …], "object_id": label}}')
        label = scribble["object_id"]
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label <= MAX_LABEL:
            raise ScribbleError(
                f"scribble {number}: object_id: expected a whole number from 0 to {MAX_LABEL}, got {label!r}"
            )
        if objects is not None and label not in (0, *objects):
            known = ", ".join(map(str, sorted({0, *objects})))
            raise ScribbleError(f"scribble {number}: object {label} is unknown; expected one of {known}")
        try:
            points = np.asarray(scribble["path"], dtype=np.float64)
        except (TypeError, ValueError):
            points = np.empty(0)
        if points.ndim != 2 or points.shape[1] != 2 or not len(points):
            raise ScribbleError(f"scribble {number}: path: expected a list of at least one point [x, y]")
        outside = ~((points >= 0) & (points <= 1)).all(1)
        if outside.any():
            point = ", ".join(f"{value:g}" for value in points[outside][0])
            raise ScribbleError(
                f"scribble {number}: the point [{point}] is outside the frame; expected values from 0 to 1"
            )


def rasterize(scribbles: Sequence[Scribble], size: tuple[int, int], smooth: bool = False) -> np.ndarray:
    """Draw the scribbles of one frame, one pixel wide, later ones on top.

    Args:
        scribbles: those of the frame.
        size: height and width of the drawing, in pixels.
        smooth: draw the Bezier curve with the path as control points instead of the lines between them.

    Returns:
        int8 labels `[H, W]`, -1 where there is no scribble.

    Raises:
        ScribbleError: invalid scribbles.

    Source: the DAVIS interactive challenge: points times (W − 1, H − 1), rounded down, joined by Bresenham's lines.
    """
    check_scribbles(scribbles)
    drawing = np.full(size, NONE, dtype=np.int8)
    for scribble in scribbles:
        points = np.asarray(scribble["path"], dtype=np.float64)
        if smooth:
            points = bezier(points, SMOOTH_POINTS)
        columns, rows = polyline(np.floor(points * (size[1] - 1, size[0] - 1)).astype(np.int64)).T
        drawing[rows, columns] = scribble["object_id"]
    return drawing


def polyline(points: np.ndarray) -> np.ndarray:
    """Integer points `[n, 2]` joined by Bresenham's lines: every pixel on them in order, int64 `[m, 2]`."""
    parts = [points[:1]]
    for start, end in zip(points[:-1], points[1:]):
        offset = end - start
        steps = np.abs(offset).max()
        if steps:
            along = np.arange(1, steps + 1)[:, None]
            parts.append(start + np.sign(offset) * ((2 * np.abs(offset) * along + steps) // (2 * steps)))
    return np.concatenate(parts)


def bezier(points: np.ndarray, count: int) -> np.ndarray:
    """Sample the Bezier curve of control points `[n, 2]`: float64 `[count, 2]`, from the last point to the first.

    Ties in rounding to pixels depend on the direction; the challenge draws in this one.
    """
    # half a second of imports
    from scipy.stats import binom

    # Bernstein polynomials as binomial probabilities, which do not overflow for long paths
    weight = binom.pmf(np.arange(len(points)), len(points) - 1, np.linspace(1, 0, count)[:, None])
    return weight @ points


def scribble_maps(drawing: np.ndarray, objects: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of n objects their own scribbles and, as negative ones, all others: 0 and 1, float32 `[n, H, W]`, five pixels
    wide.

    `drawing` is int8 `[H, W]` from `rasterize`, at the network's size.
    """
    cross = ndimage.generate_binary_structure(2, 1)
    drawn = drawing != NONE
    maps = np.zeros((2, len(objects), *drawing.shape), np.float32)
    for n, label in enumerate(objects):
        own = drawing == label
        for sign, scribble in enumerate((own, drawn & ~own)):
            maps[sign, n] = ndimage.binary_dilation(scribble, cross, iterations=DILATIONS)
    return maps[0], maps[1]


def thin(mask: np.ndarray) -> np.ndarray:
    """Thin a mask to lines one pixel wide with the same connectivity.

    Args:
        mask: bool `[H, W]`; outside the picture is background.

    Returns:
        bool `[H, W]`, a subset of the mask with as many components.

    Raises:
        ValueError: another dtype or number of dimensions.

    Source: Guo & Hall 1989, the algorithm with two subiterations.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(f"mask: expected a bool mask [H, W], got {mask.dtype} {list(mask.shape)}")
    skeleton = np.zeros_like(mask)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return skeleton
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    height, width = mask[box].shape
    # the mask is one large integer, a bit a pixel, so that each logical operation covers all pixels at once;
    # a column of background after each row separates the end of a row from the start of the next
    padded = np.pad(mask[box], ((0, 0), (0, 1)))
    bits = int.from_bytes(np.packbits(padded, bitorder="little").tobytes(), "little")
    before = None
    while bits != before:
        before = bits
        for first in (True, False):
            bits ^= _removable(bits, width + 1, first)
    packed = np.frombuffer(bits.to_bytes(-(-padded.size // 8), "little"), dtype=np.uint8)
    skeleton[box] = np.unpackbits(packed, count=padded.size, bitorder="little").reshape(height, width + 1)[:, :-1]
    return skeleton


def _removable(bits: int, stride: int, first: bool) -> int:
    """The pixels that one subiteration removes; names and conditions as in the paper."""
    p2, p6, p4, p8 = bits << stride, bits >> stride, bits >> 1, bits << 1
    p3, p9, p5, p7 = p2 >> 1, p2 << 1, p6 >> 1, p6 << 1
    upper_right, lower_right, lower_left, upper_left = p3 | p4, p5 | p6, p7 | p8, p9 | p2
    # C = 1: the neighbours are connected
    groups = (upper_right & ~p2, lower_right & ~p4, lower_left & ~p6, upper_left & ~p8)
    odd = groups[0] ^ groups[1] ^ groups[2] ^ groups[3]
    one_group = odd & ~((groups[0] & groups[1]) | (groups[2] & groups[3]))
    # 2 ≤ min(N1, N2) ≤ 3: neither the end of a line nor an inner pixel
    pairs_1 = (upper_left, upper_right, lower_right, lower_left)
    pairs_2 = (p2 | p3, p4 | p5, p6 | p7, p8 | p9)
    edge = _two_or_more(*pairs_1) & _two_or_more(*pairs_2) & ~reduce(and_, pairs_1 + pairs_2)
    kept_side = (p6 | p7 | ~p9) & p8 if first else (p2 | p3 | ~p5) & p4
    return bits & one_group & edge & ~kept_side


def _two_or_more(a: int, b: int, c: int, d: int) -> int:
    return (a & b) | (c & d) | ((a | b) & (c | d))
