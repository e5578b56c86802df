"""Masks that were made in other tools, of any format that is read."""

import zipfile
from functools import partial
from pathlib import Path

import numpy as np

from stm_model.io.formats.coco import read_coco, read_youtube_vis
from stm_model.io.formats.cvat import read_cvat
from stm_model.io.formats.labelme import read_labelme
from stm_model.io.formats.sam import read_sam
from stm_model.io.formats.shapes import DrawnMasks, Frame, LazyMasks, read_json, reading
from stm_model.io.images import MediaError, picture_files
from stm_model.io.masks import check_first, mask_files, read_mask, read_masks
from stm_model.io.video import Video
from stm_model.labels import objects_in


def read_given(
    path: Path, video: Video | None = None, *, first: int = 0, binary: bool = False, colors: bool = False
) -> dict[int, np.ndarray]:
    """The given masks of a video, frame → uint8 labels `[H, W]`: of `open_drawn`, else of `read_masks`.

    Raises:
        MediaError: as these.
    """
    drawn = open_drawn(path, video, first)
    if drawn is None:
        return read_masks(path, video, first=first, binary=binary, colors=colors)
    masks = dict(drawn)
    if not any(map(objects_in, masks.values())):
        raise MediaError(f"{path}: an empty mask, no pixel belongs to an object")
    return masks


def open_drawn(path: Path, video: Video | None = None, first: int = 0) -> DrawnMasks | None:
    """The masks in a JSON file of COCO, YouTube-VIS, LabelMe or SAM 2, in a folder of LabelMe's, or in an XML or zip of
    CVAT; None for anything else, as pictures are. A single file of LabelMe's is of the frame `first`.

    Raises:
        MediaError: it can't be read, or its masks are not of the video's frames.
    """
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        stems = {file.stem for file in picture_files(path)}
        # beside its pictures, where LabelMe writes them, or alone
        if not files or (stems and not any(file.stem in stems for file in files)):
            return None
    elif path.suffix.lower() not in (".json", ".xml", ".zip"):
        return None
    with reading(path):
        frames = (
            _from_json(path, files, video, first) if files[0].suffix.lower() == ".json" else _from_cvat(path, video)
        )
        if not any(frame.shapes for frame in frames):
            raise MediaError(f"{path}: no mask of an object in it")
        return DrawnMasks(path, frames, video)


def _from_json(path: Path, files: list[Path], video: Video | None, first: int) -> list[Frame]:
    contents = {file.name: read_json(file) for file in files}
    content = next(iter(contents.values()))
    if path.is_dir() or "shapes" in content:
        frames = read_labelme({name: one for name, one in contents.items() if "shapes" in one})
        if path.is_dir():
            return frames
        # as a single picture is
        check_first(path, video, first)
        return [frame._replace(at=first) for frame in frames]
    if isinstance(content, dict) and "videos" in content:
        return read_youtube_vis(content, video.name if video else None)
    if isinstance(content, dict) and "images" in content:
        return read_coco(content)
    return read_sam(content)


def _from_cvat(path: Path, video: Video | None) -> list[Frame]:
    pictures = {file.stem for file in video.files} if video else set()
    try:
        if path.suffix.lower() == ".xml":
            with open(path, "rb") as file:
                return read_cvat(file, pictures)
        with zipfile.ZipFile(path) as archive, archive.open("annotations.xml") as inner:
            return read_cvat(inner, pictures)
    except (FileNotFoundError, zipfile.BadZipFile, KeyError) as error:
        raise MediaError(f"{path}: can't be read as CVAT's export ({error})") from error


def picture_masks(path: Path, video: Video | None = None, *, binary: bool = False) -> LazyMasks[Path]:
    """The masks in pictures; for the arguments and errors see `read_masks`, on access `read_mask`."""
    return LazyMasks(mask_files(path, video), partial(read_mask, binary=binary))
