"""The COCO layout: images with polygons or run lengths in a json."""

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stm_model.io import images
from stm_model.io.formats.rle import decode_segmentation
from stm_model.io.images import MediaError
from stm_model.labels import VOID


class CocoImage(NamedTuple):
    """An image with its annotations, largest first."""

    path: Path
    annotations: list[dict]

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Frame uint8 `[H, W, 3]` and labels uint8 `[H, W]`: instances 1…n, crowds void. Raises MediaError."""
        frame = images.read_image(self.path)
        labels = np.zeros((frame.shape[0], frame.shape[1]), dtype=np.uint8)
        label = 0
        for annotation in self.annotations[: VOID - 1]:
            try:
                mask = decode_segmentation(annotation["segmentation"], labels.shape)
            except (ValueError, KeyError, TypeError) as error:
                raise MediaError(f"{self.path}: annotation {annotation.get('id')} is not COCO's: {error}") from error
            if annotation.get("iscrowd"):
                labels[mask & (labels == 0)] = VOID
            else:
                label += 1
                labels[mask] = label
        return frame, labels


def coco_images(annotations: str | Path) -> list[CocoImage]:
    """The images of a COCO json that have an annotated object.

    They are looked for beside the json, as COCO is unpacked: for annotations/instances_train2017.json in train2017,
    images/train2017 and images. Raises FileNotFoundError for what is missing, ValueError for another json.
    """
    path = Path(annotations)
    if not path.is_file():
        raise FileNotFoundError(f"COCO: no such file: {path}")
    try:
        content = json.loads(path.read_text())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        of_image: dict[int, list[dict]] = defaultdict(list)
        for annotation in content["annotations"]:
            of_image[annotation["image_id"]].append(
                {name: annotation.get(name) for name in ("id", "segmentation", "iscrowd", "area")}
            )
        folder = _image_folder(path, next(iter(names.values()), ""))
        found = [
            # the small ones come last, and so stay whole where they overlap a large one
            CocoImage(folder / names[key], sorted(of_image[key], key=lambda one: -(one["area"] or 0)))
            for key in sorted(of_image)
            if not all(one["iscrowd"] for one in of_image[key])
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"COCO: {path}: expected images and annotations as in COCO's instances json: {error}"
        ) from error
    if not found:
        raise ValueError(f"COCO: {path}: no image has an annotated object")
    return found


def _image_folder(annotations: Path, example: str) -> Path:
    split = annotations.stem.rpartition("_")[2]
    root = annotations.parent
    candidates = [base / inner for base in (root, root.parent) for inner in (split, f"images/{split}", "images", ".")]
    for folder in candidates:
        if (folder / example).is_file():
            return folder
    raise FileNotFoundError(f"COCO: {example} of {annotations} is in none of {', '.join(map(str, candidates))}")
