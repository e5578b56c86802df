"""Overlay videos of an evaluation's masks."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from stm_model.evaluation.protocol import Dataset
from stm_model.evaluation.scoring import find_results, read_result
from stm_model.io.images import overlay, read_image


def write_overlays(dataset: Dataset, masks: Path, out: Path, binary: bool) -> dict[str, Path]:
    """Write VIDEO.mp4 for every video: the frames that have a mask, its objects coloured.

    Args:
        dataset: the videos.
        masks: a submission.
        out: folder for the overlays.
        binary: the masks are black and white.

    Returns:
        Video → file.
    """
    # only here: what runs without --overlay must not need PyAV
    from stm_model.io.video import VideoWriter

    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for video in tqdm(dataset.videos, desc="overlay", unit="video", leave=False, delay=1, disable=None):
        folder = find_results(dataset, masks, video)
        files[video.name] = out / f"{video.name}.mp4"
        with VideoWriter(files[video.name]) as writer:
            for frame in video.asked:
                path = folder / video.mask_name(frame)
                if path.is_file():
                    pixels = read_image(video.frame_paths[frame])
                    writer.write(overlay(pixels, read_result(path, video, pixels.shape[:2], binary)))
    return files
