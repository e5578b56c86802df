"""YOLO: a text file a frame, a class and one polygon an object in shares of width and height."""

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np

from stm_model.io.files import whole
from stm_model.io.formats.export import Clip, FileEach
from stm_model.io.formats.polygons import one_polygon_of_all, parts_of
from stm_model.labels import objects_in


class YoloExport(FileEach):
    """YOLO's segmentation labels: one polygon an object, parts and holes joined by lines, specks left out."""

    target, inner, suffix = "yolo", "labels", ".txt"

    def __init__(self, out: Path, clip: Clip, keep: Collection[int] = ()):
        super().__init__(out, clip, keep)
        self.classes: list[int] = []
        """The label of each class, as they came."""

    def write(self, index: int, labels: np.ndarray, frame: np.ndarray | None) -> None:
        height, width = labels.shape
        lines = []
        for label in sorted(objects_in(labels)):
            if label not in self.classes:
                self.classes.append(label)
            # readers cut off what is behind the point, or round: both come back to the same pixels
            corners = (one_polygon_of_all(parts_of(labels == label)) + 0.25) / (width, height)
            values = " ".join(f"{value:.6f}" for value in corners.ravel())
            lines.append(f"{self.classes.index(label)} {values}\n")
        with whole(self.file(index)) as partial:
            partial.write_text("".join(lines), encoding="utf-8")

    def close(self) -> None:
        names = ", ".join(json.dumps(self.clip.object_name(label), ensure_ascii=False) for label in self.classes)
        with whole(self.path / "data.yaml") as partial:
            partial.write_text(f"path: .\ntrain: images\nval: images\nnames: [{names}]\n", encoding="utf-8")
