"""Scribbles: DAVIS' JSON in and out, drawn as pixels, as the maps that the network reads; masks thinned to lines.

A scribble is a dict as in that JSON: `path`, points [x, y] from 0 (left, top) to 1 (right, bottom), and `object_id`,
its label, 0 for background. Several frames' are `{frame index: [scribble, …]}`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.stats import binom

from stm_model.io.files import whole

Scribble = Mapping[str, Any]

NONE = -1
"""Label of a pixel without scribble."""
MOST_LABEL = 127
"""Largest label that a drawing in int8 holds."""
SMOOTH_POINTS = 1000
"""Points at which a Bezier curve is sampled."""
WIDENINGS = 2
"""How often the network's scribbles are dilated by a cross of 3×3 pixels. Source: Oh et al., CVPR 2019."""


class ScribbleError(ValueError):
    """Scribbles that cannot be used; the message says which, what was expected and what came."""


def read_scribbles(
    path: str | os.PathLike, frame_count: int | None = None, objects: Collection[int] | None = None
) -> dict[int, list[dict[str, Any]]]:
    """Read a scribble file of DAVIS' interactive challenge.

    Args:
        path: the JSON file: {"sequence": name, "scribbles": [the scribbles of each frame]}.
        frame_count: frames of the video; None allows any number.
        objects: labels that may be drawn, besides 0; None allows all up to 127.

    Returns:
        Frame index → its scribbles, frames without any left out.

    Raises:
        ScribbleError: no JSON, another form, or scribbles that `check_scribbles` refuses; the message names the file.
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
    """`read_scribbles` of JSON that is already in memory."""
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


def format_scribbles(sequence: str, frames: Mapping[int, Sequence[Scribble]], frame_count: int) -> dict[str, Any]:
    """The content of a scribble file, for a video of so many frames.

    Raises:
        ScribbleError: a frame that the video does not have, or scribbles that `check_scribbles` refuses.
    """
    for index, frame in frames.items():
        if not 0 <= index < frame_count:
            raise ScribbleError(f"scribbles on frame {index}, but the video has {frame_count} frames")
        check_scribbles(frame)
    defaults = {"start_time": 0, "end_time": 0}
    listed = [[defaults | dict(scribble) for scribble in frames.get(index, ())] for index in range(frame_count)]
    return {"sequence": sequence, "scribbles": listed}


def write_scribbles(
    path: str | os.PathLike, sequence: str, frames: Mapping[int, Sequence[Scribble]], frame_count: int
) -> None:
    """Write a scribble file, whole or not at all; see `format_scribbles`."""
    content = json.dumps(format_scribbles(sequence, frames, frame_count))
    with whole(path) as partial:
        partial.write_text(content + "\n", encoding="utf-8")


def check_scribbles(scribbles: Sequence[Scribble], objects: Collection[int] | None = None) -> None:
    """Refuse scribbles of a frame that cannot be drawn.

    Args:
        scribbles: of one frame.
        objects: labels that may be drawn, besides 0; None allows all up to 127.

    Raises:
        ScribbleError: not of the form above, a point outside the frame, or the label of no object.
    """
    for number, scribble in enumerate(scribbles):
        if not isinstance(scribble, Mapping) or not {"path", "object_id"} <= set(scribble):
            raise ScribbleError(f'scribble {number}: expected {{"path": [[x, y], …], "object_id": label}}')
        label = scribble["object_id"]
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label <= MOST_LABEL:
            raise ScribbleError(
                f"scribble {number}: object_id: expected a whole number from 0 to {MOST_LABEL}, got {label!r}"
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
        scribbles: of one frame.
        size: height and width of the drawing, in pixels.
        smooth: draw the Bezier curve that a path's points control instead of the lines between them.

    Returns:
        int8 labels `[H, W]`; -1 where no scribble is.

    Raises:
        ScribbleError: scribbles that `check_scribbles` refuses.

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
    """Whole points `[n, 2]` joined by Bresenham's lines: every point on the way, int64 `[m, 2]`."""
    parts = [points[:1]]
    for start, end in zip(points[:-1], points[1:]):
        way = end - start
        steps = np.abs(way).max()
        if steps:
            along = np.arange(1, steps + 1)[:, None]
            parts.append(start + np.sign(way) * ((2 * np.abs(way) * along + steps) // (2 * steps)))
    return np.concatenate(parts)


def bezier(points: np.ndarray, count: int) -> np.ndarray:
    """Sample the Bezier curve of control points `[n, 2]`: float64 `[count, 2]`, from the last point to the first.

    Lines that end halfway between pixels depend on the direction, which is that of the challenge's drawings.
    """
    # the Bernstein polynomials are binomial probabilities, which do not overflow for long paths
    weight = binom.pmf(np.arange(len(points)), len(points) - 1, np.linspace(1, 0, count)[:, None])
    return weight @ points


def scribble_maps(drawing: np.ndarray, objects: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """What the network reads of a frame's scribbles: for each object its own and, as negative, those of all others.

    Args:
        drawing: int8 labels `[H, W]` of `rasterize`, at the network's size.
        objects: the labels of n objects.

    Returns:
        Positive and negative maps of 0 and 1, float32 `[n, H, W]`, widened to lines of five pixels.
    """
    positive = [_widen(drawing == label) for label in objects]
    negative = [_widen((drawing != label) & (drawing != NONE)) for label in objects]
    shape = (len(objects), *drawing.shape)
    return np.reshape(positive, shape).astype(np.float32), np.reshape(negative, shape).astype(np.float32)


def _widen(scribble: np.ndarray) -> np.ndarray:
    cross = ndimage.generate_binary_structure(2, 1)
    return ndimage.binary_dilation(scribble, cross, iterations=WIDENINGS)


def thin(mask: np.ndarray) -> np.ndarray:
    """Thin a mask to lines one pixel wide that keep its connections.

    Every pixel is a bit of one large whole number: each logical step runs over all pixels at once.

    Args:
        mask: bool `[H, W]`.

    Returns:
        bool `[H, W]`, a part of the mask with as many pieces as it; empty for an empty mask.

    Raises:
        ValueError: not such a mask.

    Source: Guo & Hall 1989, the algorithm of two subiterations; what is outside the picture is background.
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
    # a column of background after each row keeps neighbours across the picture's sides apart
    padded = np.pad(mask[box], ((0, 0), (0, 1)))
    bits = int.from_bytes(np.packbits(padded, bitorder="little").tobytes(), "little")
    bits = _thin_bits(bits, width + 1)
    packed = np.frombuffer(bits.to_bytes(-(-padded.size // 8), "little"), dtype=np.uint8)
    skeleton[box] = np.unpackbits(packed, count=padded.size, bitorder="little").reshape(height, width + 1)[:, :-1]
    return skeleton


def _thin_bits(bits: int, stride: int) -> int:
    first = True
    unchanged = 0
    while unchanged < 2:
        removed = _removable(bits, stride, first)
        bits ^= removed
        unchanged = 0 if removed else unchanged + 1
        first = not first
    return bits


def _removable(bits: int, stride: int, first: bool) -> int:
    """The pixels that one subiteration takes away; names and conditions as in the paper's section on this algorithm."""
    p2, p6, p4, p8 = bits << stride, bits >> stride, bits >> 1, bits << 1
    p3, p9, p5, p7 = p2 >> 1, p2 << 1, p6 >> 1, p6 << 1
    upper_right, lower_right, lower_left, upper_left = p3 | p4, p5 | p6, p7 | p8, p9 | p2
    # C = 1: the neighbours are one connected group
    groups = (upper_right & ~p2, lower_right & ~p4, lower_left & ~p6, upper_left & ~p8)
    odd = groups[0] ^ groups[1] ^ groups[2] ^ groups[3]
    one_group = odd & ~((groups[0] & groups[1]) | (groups[2] & groups[3]))
    # 2 ≤ min(N1, N2) ≤ 3: neither the end of a line nor inside
    pairs_1 = (upper_left, upper_right, lower_right, lower_left)
    pairs_2 = (p2 | p3, p4 | p5, p6 | p7, p8 | p9)
    edge = _two_or_more(*pairs_1) & _two_or_more(*pairs_2) & ~(_all(*pairs_1) & _all(*pairs_2))
    kept_side = (p6 | p7 | ~p9) & p8 if first else (p2 | p3 | ~p5) & p4
    return bits & one_group & edge & ~kept_side


def _two_or_more(a: int, b: int, c: int, d: int) -> int:
    return (a & b) | (c & d) | ((a | b) & (c | d))


def _all(a: int, b: int, c: int, d: int) -> int:
    return a & b & c & d
