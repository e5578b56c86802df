"""Any folder to train on: its layout is read off what lies in it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from stm_model.data.coco import coco_images
from stm_model.data.davis import davis_sequences
from stm_model.data.images import LabelledImage, folder_images, frames_as_images, voc_images
from stm_model.data.video import Sequence
from stm_model.data.youtube_vos import youtube_vos_sequences


class TrainingData(NamedTuple):
    """What a folder holds."""

    sequences: list[Sequence]
    """Its videos; none in a folder of still images."""
    images: list[LabelledImage]
    """Its images; those of videos are their annotated frames."""


def open_folder(path: str | Path, split: str) -> TrainingData:
    """Find the videos or images of a dataset.

    Args:
        path: a folder in the layout of DAVIS, YouTube-VOS, COCO or Pascal VOC, a COCO json, or any folder of images and
            masks.
        split: name of the list to read in the layouts that have lists (DAVIS, VOC).

    Raises:
        FileNotFoundError: something of the layout is missing.
        ValueError: frames and masks don't match.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data: no such folder: {path}")
    videos: list[Sequence] = []
    if path.suffix == ".json":
        return TrainingData([], coco_images(path))
    if (path / "meta.json").is_file():
        videos = youtube_vos_sequences(path)
    elif any((path / "ImageSets" / year).is_dir() for year in ("2016", "2017")) or _names_davis(path):
        videos = davis_sequences(path, split)
    elif (path / "SegmentationObject").is_dir():
        has_list = (path / "ImageSets" / "Segmentation" / f"{split}.txt").is_file()
        return TrainingData([], voc_images(path, split if has_list else None))
    elif found := sorted((path / "annotations").glob("instances_train*.json")):
        return TrainingData([], coco_images(found[-1]))
    else:
        return TrainingData([], folder_images(path))
    return TrainingData(videos, frames_as_images(videos))


def _names_davis(path: Path) -> bool:
    """A folder of frames and annotations without lists; reading it as DAVIS names the list that is missing."""
    return (path / "JPEGImages").is_dir() and (path / "Annotations").is_dir()
