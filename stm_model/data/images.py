"""Still images as a source of clips: each becomes a clip by a smooth random motion of frame and mask alike.

Layouts: Pascal VOC, and any folder of images and masks (ECSSD, MSRA10K, DUTS, HKU-IS and the like). COCO's is coco.py.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from stm_model.data import video
from stm_model.data.augment import followed_objects, random_color, random_region, random_view, visible_objects
from stm_model.data.clips import Clip, DrawnClips, clip_of
from stm_model.io.images import MediaError, picture_files, read_image
from stm_model.io.masks import has_palette, read_mask
from stm_model.labels import VOID

_MASK_FOLDER = re.compile(r"mask|gt|ground|annotation|label|segmentation", re.IGNORECASE)


class LabelledImage(Protocol):
    """An image with labels, read when it is drawn."""

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Frame uint8 `[H, W, 3]` and labels uint8 `[H, W]`. Raises MediaError if they cannot be used."""
        ...


class VideoFrame(NamedTuple):
    """A frame of a video, taken as an image."""

    video: video.Video
    frame: int

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        return self.video.load_pair(self.frame)


class ImageFile(NamedTuple):
    """An image with the picture of its mask."""

    image_path: Path
    mask_path: Path

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        return video.same_size(read_image(self.image_path), _read_image_mask(self.mask_path), self.mask_path)


def _read_image_mask(path: Path) -> np.ndarray:
    """Labels of a palette or label picture; a grey one that reaches white, or has soft edges, shows one object."""
    if has_palette(path):
        return read_mask(path)
    try:
        labels = read_mask(path)
    except MediaError:
        # soft edges or JPEG; what cannot be read at all fails again
        return read_mask(path, binary=True)
    return read_mask(path, binary=True) if labels.max() == VOID else labels


def frames_as_images(videos: Iterable[video.Video]) -> list[VideoFrame]:
    """Every annotated frame of some videos as an image."""
    return [VideoFrame(source, frame) for source in videos for frame in source.annotated]


def voc_images(root: str | Path, split: str | None = None) -> list[ImageFile]:
    """The images of Pascal VOC that have instance masks, SegmentationObject; 255 on outlines is void.

    `split` is a list under ImageSets/Segmentation, None takes every mask. Raises FileNotFoundError for what is missing.
    """
    root = Path(root)
    if split is None:
        names = [path.stem for path in sorted((root / "SegmentationObject").glob("*.png"))]
    else:
        path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not path.is_file():
            raise FileNotFoundError(f"list of images: no such file: {path}")
        names = path.read_text().split()
    images = [
        ImageFile(root / "JPEGImages" / f"{name}.jpg", root / "SegmentationObject" / f"{name}.png") for name in names
    ]
    for path in (path for image in images for path in image):
        if not path.is_file():
            raise FileNotFoundError(f"VOC layout: no such file: {path}")
    return images


def folder_images(root: str | Path) -> list[ImageFile]:
    """The images of a folder with masks of the same name.

    Either images and masks lie side by side with different suffixes (`a.jpg`, `a.png`), or in two folders of which
    one is named for masks (`mask`, `gt`, `ground_truth`, `annotation`, `label`). Raises FileNotFoundError where there
    is none, ValueError for an image or a mask without a partner.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"images: no such folder: {root}")
    folders = [root, *sorted(path for path in root.rglob("*") if path.is_dir())]
    found = [image for folder in folders for image in _pairs(folder)]
    if not found:
        raise FileNotFoundError(
            f"{root}: no images with masks; expected a.jpg beside a.png, or a folder of images and one of masks"
        )
    return found


def _pairs(folder: Path) -> list[ImageFile]:
    """Pairs that lie in a folder, or in its two subfolders."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    masks = [path for path in inside if _MASK_FOLDER.search(path.name)]
    images = [path for path in inside if path not in masks and picture_files(path)]
    if len(masks) == len(images) == 1:
        return _match(picture_files(images[0]), picture_files(masks[0]), folder)
    files = picture_files(folder)
    photographs = [path for path in files if path.suffix.lower() in (".jpg", ".jpeg")]
    beside = [path for path in files if path not in photographs]
    # pictures of one kind alone are one half of a pair of folders
    return _match(photographs, beside, folder) if photographs and beside else []


def _match(images: list[Path], masks: list[Path], folder: Path) -> list[ImageFile]:
    by_name = {path.stem: path for path in masks}
    alone = {path.stem for path in images} ^ by_name.keys()
    if alone:
        raise ValueError(
            f"{folder}: {len(images)} images but {len(masks)} masks; no partner for {', '.join(sorted(alone)[:5])}"
        )
    return [ImageFile(path, by_name[path.stem]) for path in images]


class ImageClips(DrawnClips):
    """Clips of still images, in which the camera moves and everything bends."""

    def __init__(self, images: Sequence[LabelledImage], *, regions: bool = False, follow: float = 1.0, **options: Any):
        """
        Args:
            images: what to draw from.
            regions: label a random region of each image instead of its objects. Pasted on another clip it is an
                object that looks like nothing seen before.
            follow: share of the instances in view that are followed, at least one; the others are background that
                looks like what is followed.
            options: see `DrawnClips`.
        """
        super().__init__(images, **options)
        self.regions, self.follow = regions, follow

    def draw(self, source: LabelledImage, seed: int, random: torch.Generator) -> Clip:
        frame, mask = source.load()
        clip = clip_of([frame], [mask])
        labels = random_region(mask.shape, random)[None].to(torch.uint8) if self.regions else clip.labels
        frames, labels = clip.frames.expand(self.frames, -1, -1, -1), labels.expand(self.frames, -1, -1)
        clip = random_view(frames, labels, self.size, random, jitter=1.0, bend=1.0)
        clip = Clip(random_color(clip.frames, random, self.color), clip.labels)
        if self.follow < 1:
            clip = followed_objects(clip, self.follow, random)
        return visible_objects(clip, most=self.most_objects)
