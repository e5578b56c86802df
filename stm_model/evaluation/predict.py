"""Track a split into a folder of masks, and measure speed and peak memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from stm_model.evaluation.protocol import Video
from stm_model.io.images import MediaError, picture_size, read_image, width_by_height
from stm_model.io.masks import write_mask
from stm_model.labels import VOID
from stm_model.network import STM
from stm_model.network.weights import chosen_side
from stm_model.runtime import NetworkOptions, held_process_memory, peak_process_memory
from stm_model.tracking.tracker import Tracker

WARM_UP = 5
"""Frames tracked before the clock starts; their masks are dropped."""


@dataclass(frozen=True)
class Speed:
    """Tracking speed in frames, however many objects they have; reading and writing files is not counted."""

    frames: int
    """Frames timed."""
    seconds: float
    """Seconds they took, the device synchronized after each."""
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
    videos: list[Video], network: NetworkOptions, options: Mapping[str, Any], out: Path, quiet: bool = False
) -> Speed:
    """Track videos one after the other and write the masks that their benchmark asks for.

    Args:
        videos: the videos.
        network: the network, and where it runs.
        options: further arguments of the `Tracker`, as its memory rule.
        out: folder that gets a folder of masks for each video.
        quiet: show no progress.

    Returns:
        The speed over all frames of all videos.

    Raises:
        MediaError: a frame or a mask cannot be read, or does not fit its video; the message names it.
        ValueError: the settings make no sense.
    """
    model = STM.load(network.checkpoint, device=network.device, dtype=network.dtype)
    device = next(model.parameters()).device
    meter = _Meter(device)
    trackers: dict[int | None, Tracker] = {}
    total = sum(len(video.frame_paths) for video in videos)
    with tqdm(total=total, desc="track", unit="frame", delay=1, disable=quiet or None) as progress:
        for video in videos:
            size = chosen_side(network.size, network.checkpoint, picture_size(video.frame_paths[0]))
            if size not in trackers:
                trackers[size] = Tracker(model, size=size, **options)
            if meter.loaded_bytes is None:
                for _ in zip(range(WARM_UP), _results(trackers[size], video, _Meter(device))):
                    pass
                meter.start_counting()
            _track_video(video, trackers[size], meter, out / video.name, progress)
    return meter.speed()


def track_videos_apart(*arguments: Any) -> Speed:
    """`track_videos` in a new process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(track_videos, *arguments).result()


def _track_video(video: Video, tracker: Tracker, meter: _Meter, out: Path, progress: tqdm) -> None:
    out.mkdir(parents=True, exist_ok=True)
    asked = set(video.asked)
    # masks are written as the annotations are
    white = np.uint8(VOID if video.black_and_white else 1)
    progress.set_postfix_str(video.name)
    for index, labels in _results(tracker, video, meter):
        if index in asked:
            write_mask(out / video.mask_name(index), labels * white)
        progress.update()


def _results(tracker: Tracker, video: Video, meter: _Meter) -> Iterator[tuple[int, np.ndarray]]:
    """(frame, labels) of a video; the meter runs only while the tracker does."""
    given = _given_masks(video)
    results = tracker.track(_frames(video, meter), given, frame_count=len(video.frame_paths))
    while True:
        meter.resume()
        try:
            result = next(results, None)
        except MediaError:
            raise
        except ValueError as error:
            raise MediaError(f"{video.name}: {error}") from error
        meter.pause()
        if result is None:
            return
        meter.frames += 1
        yield result.index, result.labels


def _frames(video: Video, meter: _Meter) -> Iterator[np.ndarray]:
    """The frames as the tracker pulls them; the meter stops while they are read."""
    for path in video.frame_paths:
        meter.pause()
        frame = read_image(path)
        meter.resume()
        yield frame


def _given_masks(video: Video) -> dict[int, np.ndarray]:
    masks = video.given_masks()
    for frame, mask in masks.items():
        size = picture_size(video.frame_paths[frame])
        if mask.shape != size:
            annotation = video.annotations[frame]
            raise MediaError(
                f"{annotation}: {width_by_height(mask.shape)} pixels; expected {width_by_height(size)} like its frame"
            )
        for label in video.entries[frame]:
            if not (mask == label).any():
                raise MediaError(
                    f"{video.annotations[frame]}: object {label} should enter here, but is not in the mask"
                )
    return masks


class _Meter:
    """Seconds of tracking and peak memory."""

    def __init__(self, device: torch.device):
        self.device, self.frames, self.seconds = device, 0, 0.0
        self.loaded_bytes: int | None = None
        self.running_since: float | None = None

    def start_counting(self) -> None:
        """Note the memory held now; on a GPU the peak starts anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.loaded_bytes = torch.cuda.memory_allocated(self.device)
        else:
            self.loaded_bytes = held_process_memory()

    def resume(self) -> None:
        self.running_since = time.perf_counter()

    def pause(self) -> None:
        if self.running_since is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds += time.perf_counter() - self.running_since
            self.running_since = None

    def speed(self) -> Speed:
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else peak_process_memory()
        return Speed(self.frames, self.seconds, peak, self.loaded_bytes)
