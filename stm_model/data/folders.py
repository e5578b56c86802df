"""Any folder to train on: its layout is read off what lies in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stm_model.data.coco import coco_images
from stm_model.data.davis import davis_videos
from stm_model.data.images import LabelledImage, folder_images, frames_as_images, voc_images
from stm_model.data.video import Video
from stm_model.data.youtube_vos import youtube_vos_videos


class TrainingData(NamedTuple):
    """What a folder holds."""

    videos: list[Video]
    """Its videos; none in a folder of still images."""
    images: Sequence[LabelledImage]
    """Its images; those of videos are their annotated frames."""


def open_folder(path: str | Path, split: str) -> TrainingData:
    """Find the videos or images of a dataset.

    `path` is a folder in the layout of DAVIS, YouTube-VOS, COCO or Pascal VOC, a COCO json, or any folder of images and
    masks; `split` the list to read (DAVIS, VOC) or the folder (YouTube-VOS). Raises FileNotFoundError for what is
    missing, ValueError where frames and masks don't match.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data: no such folder: {path}")
    if path.suffix == ".json":
        return TrainingData([], coco_images(path))
    # the folder of a split, or that of the dataset
    splits = [folder for folder in (path, path / split, path / "train") if (folder / "meta.json").is_file()]
    if splits or is_davis(path):
        videos = youtube_vos_videos(splits[0]) if splits else davis_videos(path, split)
        return TrainingData(videos, frames_as_images(videos))
    if (path / "SegmentationObject").is_dir():
        has_list = (path / "ImageSets" / "Segmentation" / f"{split}.txt").is_file()
        return TrainingData([], voc_images(path, split if has_list else None))
    if found := sorted((path / "annotations").glob("instances_train*.json")):
        return TrainingData([], coco_images(found[-1]))
    return TrainingData([], folder_images(path))


def is_davis(path: Path) -> bool:
    """Whether a folder has DAVIS' layout; one without its lists has it too, so that the missing list is named."""
    if any((path / "ImageSets" / year).is_dir() for year in ("2016", "2017")):
        return True
    frames_and_masks = (path / "JPEGImages").is_dir() and (path / "Annotations").is_dir()
    return frames_and_masks and not (path / "SegmentationObject").is_dir()
