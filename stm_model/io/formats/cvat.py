"""CVAT for video 1.1: an XML file with a track an object, whose masks are run lengths in rows."""

import re
import warnings
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import IO
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from stm_model.io.formats.export import Clip, Spooled, box_of
from stm_model.io.formats.rle import decode_segmentation
from stm_model.io.formats.shapes import Frame, Shape, distinct_names
from stm_model.labels import objects_in

READ = ("mask", "polygon")
"""The shapes that are read."""


class CvatExport(Spooled):
    """CVAT for video 1.1; where an object is gone, its track is `outside`."""

    target = "cvat.xml"

    def __init__(self, out: Path, clip: Clip, keep: Collection[int] = ()):
        super().__init__(out, clip, keep)
        self._shown: dict[int, str] = {}
        """The last mask of each object that was in the frame before."""

    def note(self, index: int, labels: np.ndarray) -> None:
        present = sorted(objects_in(labels))
        for label in set(self._shown) - set(present):
            self.add(label, _element(index, True, self._shown.pop(label)))
        for label in present:
            self._shown[label] = _shape(labels == label)
            self.add(label, _element(index, False, self._shown[label]))

    def finish(self, file: IO[str]) -> None:
        file.write(self._head())
        for number, label in enumerate(self.labels):
            name = quoteattr(self.clip.object_name(label))
            file.write(f'  <track id="{number}" label={name} source="auto">\n')
            file.writelines(f"    {line}\n" for line in self.lines(label))
            file.write("  </track>\n")
        file.write("</annotations>\n")

    def _head(self) -> str:
        (height, width), frames = self.size, self.frames[-1] + 1
        labels = "".join(
            f"<label><name>{escape(self.clip.object_name(label))}</name><type>mask</type><attributes></attributes></label>"
            for label in self.labels
        )
        return (
            '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n'
            f"  <meta><task><size>{frames}</size><mode>interpolation</mode><start_frame>0</start_frame>"
            f"<stop_frame>{frames - 1}</stop_frame><labels>{labels}</labels>"
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


def read_cvat(file: IO[bytes], pictures: Collection[str]) -> list[Frame]:
    """Frames of CVAT's XML, for video or for images; an object is a label, or one of several tracks or groups of it.

    Masks and polygons are read, other shapes left out with a warning. Images are called by their names where these are
    among `pictures`, without suffixes, else by their numbers. Raises a ValueError for any other XML.
    """
    found: dict[int | str, list[tuple[int, tuple[str, str], ElementTree.Element]]] = {}
    sizes: dict[int | str, tuple[int, int]] = {}
    size, others = None, set()
    try:
        for _, element in ElementTree.iterparse(file):
            if element.tag == "original_size":
                size = int(element.findtext("height", "")), int(element.findtext("width", ""))
            elif element.tag in ("track", "image"):
                on_track, at = element.tag == "track", None
                if not on_track:
                    name = element.get("name", "")
                    at = name if Path(name).stem in pictures else int(element.attrib["id"])
                    sizes[at] = int(element.attrib["height"]), int(element.attrib["width"])
                for shape in element:
                    if shape.tag not in READ:
                        others.add(shape.tag)
                    elif shape.get("outside") != "1":
                        known = (element.attrib["label"], element.attrib["id"]) if on_track else None
                        who = known or (shape.attrib["label"], shape.get("group_id", ""))
                        place = int(shape.attrib["frame"]) if at is None else at
                        found.setdefault(place, []).append((int(shape.get("z_order", 0)), who, shape))
    except ElementTree.ParseError as error:
        raise ValueError(f"not well-formed XML: {error}") from error
    if size is None and not sizes:
        raise ValueError("expected CVAT's XML for video or for images")
    if others:
        warnings.warn(f"CVAT: neither masks nor polygons, left out: {', '.join(sorted(others))}", stacklevel=2)
    called = distinct_names([who for shapes in found.values() for _, who, _ in shapes])
    frames = []
    for at, shapes in found.items():
        at_size = sizes.get(at) or size
        if at_size is None:
            raise ValueError("lacks the original_size of the video")
        shapes.sort(key=lambda each: each[0])
        drawn = [Shape(called[who], partial(_drawn, shape.tag, shape.attrib, at_size)) for _, who, shape in shapes]
        frames.append(Frame(at, at_size, drawn))
    return frames


def _drawn(tag: str, values: dict[str, str], size: tuple[int, int]) -> np.ndarray:
    """A mask or polygon as bool `[H, W]`."""
    if tag == "polygon":
        return decode_segmentation([[float(value) for value in re.split("[;,]", values["points"])]], size)
    left, top, width, height = (int(float(values[name])) for name in ("left", "top", "width", "height"))
    runs = np.array([int(run) for run in values["rle"].split(",")])
    fits = 0 <= left <= left + width <= size[1] and 0 <= top <= top + height <= size[0]
    if not fits or (runs < 0).any() or runs.sum() != width * height:
        raise ValueError(f"a mask of {width}·{height} pixels at {left}, {top} with {runs.sum()} pixels in its runs")
    drawn = np.zeros(size, dtype=bool)
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    drawn[top : top + height, left : left + width] = inside.reshape(height, width)
    return drawn
