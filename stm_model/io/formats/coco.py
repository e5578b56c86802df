"""COCO: images and annotations, or videos as YouTube-VIS has them; run lengths that pycocotools reads."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from stm_model.io.formats.export import Spooled, box_of
from stm_model.io.formats.rle import decode_segmentation, encode_mask
from stm_model.io.formats.shapes import Frame, Shape, distinct_names
from stm_model.labels import objects_in


class _RunLengths(Spooled):
    """The run lengths of every object."""

    def note(self, index: int, labels: np.ndarray) -> None:
        for label in sorted(objects_in(labels)):
            mask = labels == label
            left, top, right, bottom = box_of(mask)
            found = {
                "segmentation": encode_mask(mask),
                "area": int(mask.sum()),
                "bbox": [left, top, right - left, bottom - top],
            }
            self.add(label, json.dumps({"place": len(self.frames)} | found))

    def categories(self) -> list[dict[str, Any]]:
        """A category an object: what it is, the tracker does not know."""
        return [{"id": label, "name": self.clip.object_name(label), "supercategory": "object"} for label in self.labels]


class CocoExport(_RunLengths):
    """COCO's instances json, one image a frame; `track_id` is the object's label."""

    target = "coco.json"

    def finish(self, file: IO[str]) -> None:
        height, width = self.size
        images = (
            {
                "id": place + 1,
                "file_name": self.clip.picture(index),
                "width": width,
                "height": height,
                "frame_index": index,
            }
            for place, index in enumerate(self.frames)
        )
        annotations = (
            {"image_id": found.pop("place") + 1, "category_id": label, "track_id": label, "iscrowd": 0} | found
            for label in self.labels
            for found in map(json.loads, self.lines(label))
        )
        file.write(f'{{"info": {json.dumps({"description": self.clip.name})}, "licenses": [],\n"images": ')
        _write_list(file, images)
        file.write(',\n"annotations": ')
        _write_list(file, ({"id": number} | found for number, found in enumerate(annotations, 1)))
        file.write(f',\n"categories": {json.dumps(self.categories())}}}\n')


class YoutubeVisExport(_RunLengths):
    """YouTube-VIS' json: one video, and of each object a mask or null for every frame."""

    target = "ytvis.json"

    def finish(self, file: IO[str]) -> None:
        height, width = self.size
        shape = {"width": width, "height": height, "length": len(self.frames)}
        names = [self.clip.picture(index) for index in self.frames]
        video = {"id": 1, "name": self.clip.name} | shape | {"file_names": names, "frame_indices": list(self.frames)}
        info = json.dumps({"description": self.clip.name})
        file.write(f'{{"info": {info}, "licenses": [],\n"videos": [{json.dumps(video)}],\n"annotations": [')
        for number, label in enumerate(self.labels, 1):
            start = {"id": number, "video_id": 1, "category_id": label, "iscrowd": 0} | shape
            file.write(("," if number > 1 else "") + "\n" + json.dumps(start)[:-1])
            for key, name in (("segmentation", "segmentations"), ("bbox", "bboxes"), ("area", "areas")):
                file.write(f',\n"{name}": ')
                _write_list(file, self._over_time(label, key))
            file.write("}")
        file.write(f'],\n"categories": {json.dumps(self.categories())}}}\n')

    def _over_time(self, label: int, key: str) -> Iterable[Any]:
        """What was noted of an object under a key, null where it is not in the frame."""
        next_place = 0
        for found in map(json.loads, self.lines(label)):
            yield from [None] * (found["place"] - next_place)
            yield found[key]
            next_place = found["place"] + 1
        yield from [None] * (len(self.frames) - next_place)


def _write_list(file: IO[str], items: Iterable[Any]) -> None:
    separator = "["
    for item in items:
        file.write(separator + json.dumps(item))
        separator = ",\n"
    file.write("[]" if separator == "[" else "]")


def read_coco(content: dict[str, Any]) -> list[Frame]:
    """The annotated images of COCO's instances json; crowds are void. Objects are told apart by `track_id`, else by
    their category, and in a single image by their order.

    Raises a ValueError where they can't be told apart.
    """
    names = {category["id"]: str(category["name"]) for category in content.get("categories", ())}
    of_image: dict[Any, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    images = [image for image in content["images"] if of_image[image["id"]]]
    return [
        Frame(
            image.get("frame_index", str(image["file_name"])),
            (int(image["height"]), int(image["width"])),
            _shapes(of_image[image["id"]], names, (int(image["height"]), int(image["width"])), len(images) == 1),
        )
        for image in images
    ]


def _shapes(annotations: list[dict], names: dict[Any, str], size: tuple[int, int], alone: bool) -> list[Shape]:
    called: list[str | None] = []
    for number, annotation in enumerate(annotations, 1):
        track = annotation.get("track_id", annotation.get("attributes", {}).get("track_id"))
        category = names.get(annotation.get("category_id"), "object")
        if annotation.get("iscrowd"):
            called.append(None)
        elif track is not None:
            called.append(str(track))
        elif alone:
            called.append(f"{category} {number}" if names else str(number))
        else:
            called.append(category)
            if called.count(category) > 1:
                raise ValueError(f"an image with two of {category}; expected a track_id to know them in the next one")
    shapes = [
        Shape(name, partial(decode_segmentation, annotation["segmentation"], size))
        for name, annotation in zip(called, annotations)
    ]
    # small objects lie on large ones
    order = sorted(range(len(shapes)), key=lambda place: -(annotations[place].get("area") or 0))
    return [shapes[place] for place in order]


def read_youtube_vis(content: dict[str, Any], name: str | None) -> list[Frame]:
    """The frames of the one video of a YouTube-VIS json, or of the one that is called `name`. Raises a ValueError where
    there is none.
    """
    videos = content["videos"]
    if len(videos) > 1:
        videos = [video for video in videos if str(Path(video["file_names"][0]).parent) == name]
    if len(videos) != 1:
        raise ValueError(f"{len(content['videos'])} videos, none called {name}; expected one")
    (video,) = videos
    names = {category["id"]: str(category["name"]) for category in content.get("categories", ())}
    annotations = [annotation for annotation in content["annotations"] if annotation["video_id"] == video["id"]]
    pairs = [(names.get(annotation["category_id"], "object"), annotation["id"]) for annotation in annotations]
    called = distinct_names(pairs)
    size = int(video["height"]), int(video["width"])
    return [
        Frame(
            video["frame_indices"][place] if "frame_indices" in video else file_name,
            size,
            [
                Shape(called[pair], partial(decode_segmentation, annotation["segmentations"][place], size))
                for pair, annotation in zip(pairs, annotations)
                if annotation["segmentations"][place]
            ],
        )
        for place, file_name in enumerate(video["file_names"])
    ]
