"""Track a split into a folder of masks, and measure speed and peak memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stm_model.evaluation.protocol import Video
from stm_model.io.files import write_json
from stm_model.io.images import MediaError, picture_size, read_image, width_by_height
from stm_model.io.masks import write_mask
from stm_model.labels import VOID
from stm_model.network import STM
from stm_model.processes import worker_pool
from stm_model.progress import Progress
from stm_model.runtime import NetworkOptions, chosen_side, held_process_memory, peak_process_memory, timed
from stm_model.tracking.result import FrameResult
from stm_model.tracking.tracker import Tracker

WARM_UP = 5
"""Frames tracked before the clock starts; their masks are dropped."""


@dataclass(frozen=True)
class Speed:
    """Tracking speed in frames, however many objects they have; reading and writing files is not counted."""

    frames: int
    seconds: float
    """Seconds they took."""
    peak_bytes: int | None
    """Peak memory: allocated on a GPU, else of the process; None where the system does not say."""
    loaded_bytes: int | None
    """Memory before the first timed frame, after the warm-up, counted the same way."""

    @property
    def fps(self) -> float:
        """Frames over seconds."""
        return self.frames / max(self.seconds, 1e-9)

    def __add__(self, other: Speed) -> Speed:
        """Two runs side by side: frames and seconds add up, the greater peak counts."""
        greater = max((self, other), key=lambda run: run.peak_bytes or 0)
        return Speed(self.frames + other.frames, self.seconds + other.seconds, greater.peak_bytes, greater.loaded_bytes)


def track_videos(
    videos: list[Video],
    network: NetworkOptions,
    options: Mapping[str, Any],
    out: Path,
    quiet: bool = False,
    certainty: Path | None = None,
    both_ways: bool = False,
) -> Speed:
    """Track videos one after the other and write OUT/VIDEO/ with the masks that their benchmark asks for.

    Args:
        videos: the videos.
        network: the network, and where it runs.
        options: further arguments of the `Tracker`, as its memory rule.
        out: folder that gets a folder of masks for each video.
        quiet: show no progress.
        certainty: folder that gets VIDEO.json with how far each mask can be trusted: label → frame → trust.
        both_ways: track backwards too, from the masks of later frames.

    Raises:
        MediaError: a frame or a mask cannot be read, or does not fit its video; the message names it.
    """
    model = STM.load(network.checkpoint, device=network.device, dtype=network.dtype)
    device = next(model.parameters()).device
    trackers: dict[int | None, Tracker] = {}
    spent, loaded, frames = {"tracking": 0.0, "reading": 0.0}, None, 0
    total = sum(len(video.frame_paths) for video in videos)
    with Progress(desc="track", unit="frame", total=total, shown=not quiet) as progress:
        for number, video in enumerate(videos):
            masks = _given_masks(video)
            size = chosen_side(network.size, network.checkpoint, picture_size(video.frame_paths[0]), masks)
            if size not in trackers:
                trackers[size] = Tracker(model, size=size, ahead=True, **options)
            if not number:
                for _ in zip(range(WARM_UP), _results(trackers[size], video, masks, dict(spent), False)):
                    pass
                loaded = _held_memory(device)
            progress.set_postfix_str(video.name, refresh=False)
            sure: dict[int, dict[int, float]] = {}
            results = _results(trackers[size], video, masks, spent, both_ways)
            for result in _write(video, results, out / video.name):
                for label, value in zip(result.objects, result.trust):
                    sure.setdefault(label, {})[result.index] = round(value, 4)
                frames += 1
                progress.update()
            if certainty is not None:
                certainty.mkdir(parents=True, exist_ok=True)
                write_json(certainty / f"{video.name}.json", sure)
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else peak_process_memory()
    if peak is not None and loaded is not None:
        # Linux notes the peak less exactly than what is held
        peak = max(peak, loaded)
    return Speed(frames, spent["tracking"], peak, loaded)


def _held_memory(device: torch.device) -> int | None:
    """The memory held now; on a GPU the peak starts anew."""
    gc.collect()
    if device.type != "cuda":
        return held_process_memory()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def track_videos_apart(*arguments: Any) -> Speed:
    """`track_videos` in a new process, so that its peak memory is its own."""
    with worker_pool(1) as pool:
        return pool.submit(track_videos, *arguments).result()


def _write(video: Video, results: Iterable[FrameResult], out: Path) -> Iterator[FrameResult]:
    """Write the masks that the benchmark asks for, as the annotations are; each result is given on."""
    out.mkdir(parents=True, exist_ok=True)
    asked = set(video.asked)
    white = np.uint8(VOID if video.black_and_white else 1)
    for result in results:
        if result.index in asked:
            write_mask(out / video.mask_name(result.index), result.labels * white)
        yield result


class _Frames:
    """The frames of a video, read when they are asked for; `spent` gets the seconds."""

    def __init__(self, video: Video, spent: dict[str, float]):
        self.video, self.spent = video, spent

    def __len__(self) -> int:
        return len(self.video.frame_paths)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> np.ndarray:
        started = time.perf_counter()
        frame = read_image(self.video.frame_paths[index])
        took = time.perf_counter() - started
        self.spent["reading"] += took
        self.spent["tracking"] -= took
        return frame


def _results(
    tracker: Tracker, video: Video, masks: dict[int, np.ndarray], spent: dict[str, float], both_ways: bool
) -> Iterator[FrameResult]:
    """The results of a video; `spent` gets the seconds of tracking, without those of reading."""
    track = tracker.track_both_ways if both_ways else tracker.track
    try:
        yield from timed(track(_Frames(video, spent), masks), spent, "tracking")
    except MediaError:
        raise
    except ValueError as error:
        raise MediaError(f"{video.name}: {error}") from error


def _given_masks(video: Video) -> dict[int, np.ndarray]:
    masks = video.given_masks()
    for frame, mask in masks.items():
        size = picture_size(video.frame_paths[frame])
        if mask.shape != size:
            annotation = video.annotations[frame]
            raise MediaError(
                f"{annotation}: {width_by_height(mask.shape)} pixels; expected {width_by_height(size)} like its frame"
            )
        for label in video.entries.get(frame, ()):
            if not (mask == label).any():
                raise MediaError(
                    f"{video.annotations[frame]}: object {label} should enter here, but is not in the mask"
                )
    return masks
