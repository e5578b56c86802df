"""napari's widget "Track labels": objects drawn in a Labels layer are followed through an Image layer."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from magicgui import magic_factory
from napari import Viewer
from napari.layers import Image, Labels
from napari.qt.threading import create_worker

from stm_model.network import STM
from stm_model.runtime import chosen_side
from stm_model.tracking.tracker import Tracker

MAX_LABEL = 254


def track_layers(viewer: Viewer, video: Image, labels: Labels) -> Any:
    """Follow what is drawn in `labels` through `video`, from the frame where each object is drawn first.

    The result is a new Labels layer, which fills while the tracker works; a drawing in a later frame replaces what was
    found there. Another run after correcting the drawing takes it up.
    """
    frames, masks = video.data, drawn_masks(labels.data, video.data)
    size = frames.shape[1:3]
    result = viewer.add_labels(np.zeros((len(frames), *size), np.uint8), name=f"{labels.name} tracked")
    tracker = Tracker(_network(), size=chosen_side(None, None, size, masks))

    def show(found: tuple[int, np.ndarray]) -> None:
        index, tracked = found
        result.data[index] = tracked
        viewer.dims.set_point(0, index)
        result.refresh()

    settings = {"_connect": {"yielded": show}, "_progress": {"total": len(frames)}}
    return create_worker(tracked_frames, tracker, frames, masks, tuple(video.contrast_limits), **settings)


def tracked_frames(
    tracker: Tracker, frames: Any, masks: dict[int, np.ndarray], limits: tuple[float, float]
) -> Iterator[tuple[int, np.ndarray]]:
    """Index and labels `[H, W]` of each frame; frames are as in an Image layer, `[T, H, W]` or `[T, H, W, 3 or 4]`."""
    pictures = (as_picture(np.asarray(frames[index]), limits) for index in range(len(frames)))
    for found in tracker.track(pictures, masks, len(frames)):
        yield found.index, found.labels


def as_picture(frame: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """A frame of an Image layer, as it is shown, in uint8 `[H, W, 3]`."""
    if frame.ndim == 2:
        low, high = limits
        shown = (frame.astype(np.float32) - low) * (255 / max(high - low, 1e-12))
        return np.repeat(np.rint(shown.clip(0, 255)).astype(np.uint8)[..., None], 3, axis=2)
    if frame.dtype.kind == "f":
        frame = np.rint(frame.clip(0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(frame[..., :3])


def drawn_masks(labels: Any, frames: Any) -> dict[int, np.ndarray]:
    """Label maps by frame, of the frames in which something is drawn.

    Raises:
        ValueError: the layers are of different sizes, nothing is drawn, or a label is above 254.
    """
    if frames.ndim < 3 or (frames.ndim == 3 and frames.shape[2] in (3, 4)):
        raise ValueError(f"video: expected frames [T, H, W] or [T, H, W, 3], got {list(frames.shape)}")
    drawn = np.asarray(labels)
    drawn = drawn[None] if drawn.ndim == 2 else drawn
    if drawn.shape[1:] != frames.shape[1:3] or len(drawn) not in (1, len(frames)):
        raise ValueError(
            f"labels: expected {[len(frames), *frames.shape[1:3]]} like the video, got {list(drawn.shape)}"
        )
    if drawn.max(initial=0) > MAX_LABEL:
        raise ValueError(f"labels: expected labels up to {MAX_LABEL}, got {drawn.max()}")
    masks = {index: mask.astype(np.uint8) for index, mask in enumerate(drawn) if mask.any()}
    if not masks:
        raise ValueError("labels: expected a drawn object in some frame, got none")
    return masks


track_widget = magic_factory(track_layers, call_button="Track")


@cache
def _network() -> STM:
    return STM.load()
