"""LabelMe: a JSON file a frame, whose polygons of one object share a `group_id`."""

from __future__ import annotations

import json
import os

import numpy as np

from stm_model.io.files import whole
from stm_model.io.formats.export import FileEach, object_name, objects_of
from stm_model.io.formats.polygons import one_polygon, parts_of


class LabelmeExport(FileEach):
    """LabelMe's JSON: a polygon for each part of an object, holes cut in by a line."""

    target, suffix = "labelme", ".json"

    def write(self, index: int, labels: np.ndarray, frame: np.ndarray | None) -> None:
        picture = self.clip.picture(index)
        if self.clip.files:
            picture = os.path.relpath(self.clip.files[index], self.folder)
        shapes = [
            {
                "label": object_name(label),
                "points": one_polygon(part).astype(float).tolist(),
                "group_id": label,
                "description": "",
                "shape_type": "polygon",
                "flags": {},
                "mask": None,
            }
            for label in objects_of(labels)
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
        with whole(self.file(index)) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")
