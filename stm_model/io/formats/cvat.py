"""CVAT for video 1.1: an XML file with a track an object, whose masks are run lengths in rows."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np

from stm_model.io.files import whole
from stm_model.io.formats.export import Clip, Export, Spool, box_of, object_name, objects_of


class CvatExport(Export):
    """CVAT for video 1.1; where an object is gone, its track is `outside`."""

    target = "cvat.xml"

    def __init__(self, out: Path, clip: Clip, keep: int = 0):
        super().__init__(out, clip, keep)
        self.spool, self.frames, self.size = Spool(self.path), 0, (0, 0)
        self._shown: dict[int, str] = {}
        """The last mask of each object that was in the frame before."""

    def write(self, index: int, labels: np.ndarray, frame: np.ndarray | None) -> None:
        present = objects_of(labels)
        for label in set(self._shown) - set(present):
            self.spool.add(label, _element(index, True, self._shown.pop(label)))
        for label in present:
            self._shown[label] = _shape(labels == label)
            self.spool.add(label, _element(index, False, self._shown[label]))
        self.frames, self.size = index + 1, labels.shape

    def close(self) -> None:
        try:
            if self.frames:
                with whole(self.path) as partial, open(partial, "w", encoding="utf-8") as file:
                    file.write(self._head())
                    for number, label in enumerate(self.spool.labels):
                        name = quoteattr(object_name(label))
                        file.write(f'  <track id="{number}" label={name} source="auto">\n')
                        file.writelines(f"    {line}\n" for line in self.spool.lines(label))
                        file.write("  </track>\n")
                    file.write("</annotations>\n")
        finally:
            self.spool.close()

    def discard(self) -> None:
        self.spool.close()

    def _head(self) -> str:
        height, width = self.size
        labels = "".join(
            f"<label><name>{object_name(label)}</name><type>mask</type><attributes></attributes></label>"
            for label in self.spool.labels
        )
        return (
            '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n'
            f"  <meta><task><size>{self.frames}</size><mode>interpolation</mode><start_frame>0</start_frame>"
            f"<stop_frame>{self.frames - 1}</stop_frame><labels>{labels}</labels>"
            f"<original_size><width>{width}</width><height>{height}</height></original_size></task></meta>\n"
        )


def _shape(mask: np.ndarray) -> str:
    """The attributes of a mask: the box around it, and the lengths of its runs in there, by rows, background first."""
    left, top, right, bottom = box_of(mask)
    inside = mask[top:bottom, left:right].ravel()
    changes = np.flatnonzero(np.diff(inside, prepend=False))
    runs = np.diff(changes, prepend=0, append=inside.size)
    box = f'left="{left}" top="{top}" width="{right - left}" height="{bottom - top}"'
    return f'rle="{", ".join(map(str, runs.tolist()))}" {box}'


def _element(index: int, outside: bool, shape: str) -> str:
    return f'<mask frame="{index}" outside="{outside:d}" occluded="0" keyframe="1" {shape} z_order="0"></mask>'
