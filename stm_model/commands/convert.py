"""`stm convert`: masks that are there already, in another format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

# what reads and writes is imported where it is used: `stm convert --help` answers at once
if TYPE_CHECKING:
    import numpy as np

    from stm_model.io.video import Video


@dataclass(frozen=True)
class ConvertConfig:
    """Write masks in other formats, one after the other, into the --out folder.

    Formats: png (palette), coco (coco.json), ytvis (ytvis.json), mots, cvat (cvat.xml), labelme, yolo, alpha (RGBA
    PNGs), alpha-mov (ProRes 4444), alpha-webm (VP9), matte (mp4), matte-webm, exr.
    """

    masks: tyro.conf.Positional[Path]
    """A folder of masks named by frame number, or one mask; a json of COCO, YouTube-VIS, LabelMe or SAM 2, a folder of
    LabelMe's, CVAT's xml or zip."""
    to: tuple[str, ...]
    """The formats to write."""
    out: Path
    """Folder for the results."""
    video: Path | None = None
    """The video of the masks: gives frames their names and times, and alpha its pixels."""
    binary: bool = False
    """The masks are black and white: what is bright is one object, label 1."""
    overwrite: bool = False
    """Replace earlier results of these formats."""


def convert(config: ConvertConfig) -> int:
    """Run the conversion; the exit code."""
    from stm_model.io.files import locked
    from stm_model.io.formats.export import Clip
    from stm_model.io.formats.given import open_drawn, picture_masks
    from stm_model.io.formats.table import FORMATS, Exports, check_formats
    from stm_model.io.video import open_video
    from stm_model.progress import Progress

    check_formats(config.to, "--to", FORMATS, frames=config.video is not None)
    video = None if config.video is None else open_video(config.video)
    name = config.masks.resolve().stem if video is None else video.name
    exports = Exports(config.to, config.out, Clip(name, video))
    _check_output(config, exports.files)
    masks = open_drawn(config.masks, video) or picture_masks(config.masks, video, binary=config.binary)
    with locked(config.out), Progress(desc="convert", unit="frame", total=len(masks)) as progress, exports:
        try:
            for index, labels, frame in _checked(masks, video, exports.needs_frames, config.masks):
                exports.write(index, labels, frame)
                progress.update()
        except BaseException:
            # a part of them would look like the whole
            exports.discard()
            raise
    print("\n".join(f"{name:11} {file}" for name, file in exports.files.items()))
    return 0


def _check_output(config: ConvertConfig, files: Mapping[str, str]) -> None:
    """Raise a ValueError where results would replace something they should not."""
    for file in map(Path, files.values()):
        if file.resolve() in (config.masks.resolve(), *config.masks.resolve().parents):
            raise ValueError(f"--out {config.out}: {file.name} would replace the masks; choose another folder")
        if file.exists() and not config.overwrite:
            raise ValueError(f"{file}: is there already; choose another --out, or add --overwrite")


def _checked(
    masks: Mapping[int, np.ndarray], video: Video | None, needs_frames: bool, path: Path
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Index, labels and, where they are needed, pixels of the frames that have a mask. Raises a ValueError for masks of
    another size than the video, or than the first of them.
    """
    from stm_model.io.images import width_by_height

    pixels = enumerate(video) if video is not None and needs_frames else ((index, None) for index in sorted(masks))
    size, whose = (None, "") if video is None else (video.size, "the video")
    for index, frame in pixels:
        if index not in masks:
            continue
        labels = masks[index]
        if size is None:
            size, whose = labels.shape, f"that of frame {index}"
        if labels.shape != size:
            raise ValueError(
                f"{path}: the mask of frame {index} is {width_by_height(labels.shape)} pixels, {whose} "
                f"{width_by_height(size)}"
            )
        yield index, labels, frame
