"""Small datasets in the benchmarks' layouts."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from stm_model.io import images
from stm_model.io.masks import write_mask


def write_video(
    frames_folder: Path,
    masks_folder: Path,
    frames: Iterable[np.ndarray],
    labels: Iterable[np.ndarray],
    name: str = "{:05d}",
    masks: Collection[int] | None = None,
) -> None:
    """Frames as JPEG and the labels of `masks` (frame numbers; None is all) as PNG."""
    for folder in (frames_folder, masks_folder):
        folder.mkdir(parents=True, exist_ok=True)
    for index, (frame, mask) in enumerate(zip(frames, labels)):
        images.write_image(frames_folder / f"{name.format(index)}.jpg", frame)
        if masks is None or index in masks:
            write_mask(masks_folder / f"{name.format(index)}.png", mask)


def write_davis(root: Path, clips: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """DAVIS 2017, with DAVIS 2016's list of the same videos."""
    for name, (frames, labels) in clips.items():
        write_video(root / "JPEGImages/480p" / name, root / "Annotations/480p" / name, frames, labels)
    for year in ("2016", "2017"):
        (root / "ImageSets" / year).mkdir(parents=True)
        (root / "ImageSets" / year / "val.txt").write_text("\n".join(clips) + "\n")
    return root
