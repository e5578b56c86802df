"""LabelMe: a JSON file a frame, whose polygons of one object share a `group_id`."""

import base64
import io
import json
import os
from functools import partial
from typing import Any

import numpy as np

from stm_model.io.files import whole
from stm_model.io.formats.export import FileEach
from stm_model.io.formats.polygons import one_polygon, parts_of
from stm_model.io.formats.shapes import Frame, Shape, distinct_names
from stm_model.io.images import MediaError, fill_polygons, open_picture
from stm_model.labels import objects_in


class LabelmeExport(FileEach):
    """LabelMe's JSON: a polygon for each part of an object, holes cut in by a line."""

    target, suffix = "labelme", ".json"

    def write(self, index: int, labels: np.ndarray, frame: np.ndarray | None) -> None:
        picture = self.clip.picture(index)
        if self.clip.files:
            picture = os.path.relpath(self.clip.files[index], self.folder)
        shapes = [
            {
                "label": self.clip.object_name(label),
                "points": one_polygon(part).astype(float).tolist(),
                "group_id": label,
                "description": "",
                "shape_type": "polygon",
                "flags": {},
                "mask": None,
            }
            for label in sorted(objects_in(labels))
            for part in parts_of(labels == label)
        ]
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": picture,
            "imageData": None,
            "imageHeight": labels.shape[0],
            "imageWidth": labels.shape[1],
        }
        with whole(self.file(index)) as path:
            path.write_text(json.dumps(content), encoding="utf-8")


def read_labelme(contents: dict[str, dict[str, Any]]) -> list[Frame]:
    """Frames of LabelMe's files, by the names of these; an object is a label, or a label and a `group_id`."""
    pairs = [
        (str(shape["label"]), shape.get("group_id")) for content in contents.values() for shape in content["shapes"]
    ]
    called = distinct_names(pairs)
    frames = []
    for name, content in contents.items():
        size = int(content["imageHeight"]), int(content["imageWidth"])
        shapes = [
            Shape(called[str(shape["label"]), shape.get("group_id")], partial(_drawn, shape, size))
            for shape in content["shapes"]
        ]
        frames.append(Frame(name, size, shapes))
    return frames


def _drawn(shape: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """A shape as bool `[H, W]`, as LabelMe draws it."""
    kind, points = shape.get("shape_type") or "polygon", np.asarray(shape["points"], dtype=np.float64)
    if kind in ("polygon", "oriented_rectangle") and len(points) >= 3:
        return fill_polygons(size, [points.ravel().tolist()])
    if kind == "rectangle" and len(points) == 2:
        (left, top), (right, bottom) = points
        return fill_polygons(size, [[left, top, right, top, right, bottom, left, bottom]])
    if kind == "circle" and len(points) == 2:
        rows, columns = np.indices(size)
        (x, y), radius = points[0], np.hypot(*(points[1] - points[0]))
        return np.hypot(rows - y, columns - x) <= radius
    if kind == "mask" and len(points) == 2:
        left, top = points[0].astype(int)
        try:
            with open_picture(io.BytesIO(base64.b64decode(shape["mask"]))) as image:
                inside = np.array(image) > 0
        except MediaError as error:
            raise ValueError("a mask that is no PNG in base64") from error
        drawn = np.zeros(size, dtype=bool)
        drawn[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        return drawn
    raise ValueError(f"a {kind} of {len(points)} points; expected a polygon, rectangle, circle or mask")
