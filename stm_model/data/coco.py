"""Images annotated in COCO's json: polygons, and run-length codes plain or compressed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stm_model.data.video import same_size
from stm_model.io import images
from stm_model.io.images import VOID, MediaError


class CocoImage(NamedTuple):
    """An image with its annotations, largest first."""

    path: Path
    annotations: list[dict]

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Frame uint8 `[H, W, 3]` and labels uint8 `[H, W]`: instances 1…n, crowds void.

        Raises:
            MediaError: the image cannot be read, or its annotations not understood.
        """
        frame = images.read_image(self.path)
        labels = np.zeros(frame.shape[:2], dtype=np.uint8)
        label = 0
        for annotation in self.annotations[: VOID - 1]:
            try:
                mask = decode_segmentation(annotation["segmentation"], frame.shape[:2])
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise MediaError(f"{self.path}: annotation {annotation.get('id')} is not COCO's: {error}") from error
            same_size(frame, mask, self.path)
            if annotation.get("iscrowd"):
                labels[mask & (labels == 0)] = VOID
            else:
                label += 1
                labels[mask] = label
        return frame, labels


def coco_images(annotations: str | Path, folder: str | Path | None = None) -> list[CocoImage]:
    """The images of a COCO json that have an annotated object.

    Args:
        annotations: the json.
        folder: where the images are; None looks beside the json, as COCO is unpacked: for
            annotations/instances_train2017.json in train2017, images/train2017 and images.

    Raises:
        FileNotFoundError: the json or the folder of the images is missing.
        ValueError: the json is not COCO's.
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
        folder = Path(folder) if folder is not None else _image_folder(path, next(iter(names.values()), ""))
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


def decode_segmentation(segmentation: list | dict, size: tuple[int, int]) -> np.ndarray:
    """An instance's mask, bool `[H, W]`.

    Args:
        segmentation: polygons, or a run-length code {"size": [H, W], "counts": numbers or COCO's string}.
        size: height and width of the image, for polygons.

    Raises:
        ValueError: the runs do not fill the mask.
    """
    if isinstance(segmentation, dict):
        return decode_runs(segmentation["counts"], segmentation["size"])
    return images.fill_polygons(size, segmentation)


def decode_runs(counts: Sequence[int] | str, size: Sequence[int]) -> np.ndarray:
    """Lengths of runs of 0 and 1 in turn, down the columns, to a mask bool `[H, W]`."""
    runs = _read_string(counts) if isinstance(counts, str) else list(counts)
    height, width = size
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(f"run lengths: expected a sum of {height}·{width} pixels, got {sum(runs)}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _read_string(text: str) -> list[int]:
    """Numbers from COCO's string: five bits a character, a sixth for more to come; from the fourth on differences."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
