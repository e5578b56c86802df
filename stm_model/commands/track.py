"""What `stm track` does with one video: look at what it was given, load the network, track into a folder."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stm_model import STM, Tracker
from stm_model.io.images import resize_mask
from stm_model.io.video import FrameFolder, VideoFile, open_video, read_masks
from stm_model.network.weights import network_size
from stm_model.tracking.budget import MemoryBudget, parse_size
from stm_model.tracking.resume import Checkpoint
from stm_model.tracking.run import CHECKPOINT, OUTPUTS, Run, is_output_of, one_line, plain_settings

SAME_RESULTS = frozenset({"out", "device", "overwrite", "json", "resume", "checkpoint_every"})
"""Settings that a result does not depend on."""


def track_video(
    config: Any, load: Callable[..., STM] | None = None, title: str | None = "track", announce: bool = True
) -> tuple[Run, int]:
    """Track one video into its folder.

    Args:
        config: the settings, those of `stm track`.
        load: gives the network; None is `load_model`.
        title: stands before the bar of progress; None shows no bar.
        announce: print beforehand what will be remembered.

    Returns:
        The run, still to be reported, and its exit code.

    Raises:
        ValueError, OSError: the input or a setting makes no sense; nothing was written.
    """
    check_output(config)
    video = open_video(config.video)
    masks = _given_masks(config, video)
    config = dataclasses.replace(config, size=network_size(config.size, config.checkpoint, video.size))
    tracker = make_tracker(config, load)
    run = Run("track", config.out, tracker, config)
    checkpoint = Checkpoint(config.out / CHECKPOINT, config.checkpoint_every, config.video)
    saved = checkpoint.read() if config.resume else None
    # a video of unknown length is tracked all the same
    plan = None if video.frame_count is None else tracker.plan(video.size, video.frame_count, masks)
    beforehand = [f"remembers   {plan}"] if plan else []
    beforehand += [f"goes on     after {saved['summary']['frames']} frames"] if saved else []
    code = run.track(
        video,
        masks,
        count=video.frame_count,
        fps=video.fps,
        write_overlay=config.overlay,
        title=title,
        beforehand=beforehand if announce and not config.json else (),
        checkpoint=checkpoint,
        saved=saved,
    )
    bank = tracker.bank
    run.summary["memory"] = {"planned": plan and str(plan), "most_bytes": bank.most, "evicted": bank.evicted}
    return run, code


def finished(config: Any) -> dict[str, Any] | None:
    """The summary of an earlier run that finished this video with these settings; None if none did.

    Raises:
        ValueError: the folder holds something else, or what other settings gave; the message names the first that
            differs.
    """
    if not is_output_of("track", config.out):
        raise ValueError(f"{config.out}: holds something else than results; choose another --out, or add --overwrite")
    file = config.out / "summary.json"
    summary = json.loads(file.read_text()) if file.is_file() else {"stopped": "unfinished"}
    if summary["stopped"] is not None:
        return None
    asked = plain_settings(config) | {"size": network_size(config.size, config.checkpoint, summary["size"])}
    for name, value in asked.items():
        if name not in SAME_RESULTS and (found := summary["settings"].get(name)) != value:
            raise ValueError(
                f"{config.out}: was tracked with --{name.replace('_', '-')} {found}, now it is {value}; choose another "
                "--out, or add --overwrite"
            )
    # a run that is killed at its very end leaves it
    (config.out / CHECKPOINT).unlink(missing_ok=True)
    return summary


def make_tracker(config: Any, load: Callable[..., STM] | None = None) -> Tracker:
    """A tracker with the settings of `stm track`. Raises a ValueError that names the one that makes no sense."""
    budget = MemoryBudget(
        _bytes("--memory-budget", config.memory_budget), _bytes("--host-budget", config.host_budget), config.eviction
    )
    model = (load or load_model)(config.checkpoint, config.device, config.dtype)
    return Tracker(
        model,
        memory=config.memory,
        size=config.size,
        budget=budget,
        skip_uncertain=config.skip_uncertain,
        compiled=config.compile,
        top_k=config.top_k,
        skip=config.skip,
    )


def load_model(checkpoint: Path | None, device: str | None, dtype: str | None) -> STM:
    """The network of a checkpoint on a device. Raises a ValueError where the device cannot be used."""
    if device is not None:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {device}: cannot be used here ({one_line(error)})") from error
    return STM.load(checkpoint, device=device, dtype=getattr(torch, dtype) if dtype else None)


def check_output(config: Any) -> None:
    """Raise a ValueError where results would replace something they should not."""
    if config.out.exists() and not config.out.is_dir():
        raise ValueError(f"--out {config.out}: is a file; expected a folder")
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on with what --overwrite replaces; choose one of them")
    if config.resume:
        finished(config)
    elif config.out.is_dir() and any(config.out.iterdir()) and not config.overwrite:
        raise ValueError(f"--out {config.out}: is not empty; choose another folder, or add --overwrite or --resume")
    ours = {(config.out / name).resolve() for name in OUTPUTS}
    for name in ("video", "mask"):
        path = getattr(config, name).resolve()
        if ours & {path, *path.parents}:
            raise ValueError(f"--out {config.out}: the results would overwrite the {name}; choose another folder")


def _given_masks(config: Any, video: VideoFile | FrameFolder) -> dict:
    masks = read_masks(config.mask, video, binary=config.binary)
    height, width = video.size
    for index, labels in masks.items():
        if labels.shape != video.size and not config.resize_mask:
            raise ValueError(
                f"{config.mask}: the mask of frame {index} is {labels.shape[1]}x{labels.shape[0]} pixels, the video "
                f"{width}x{height}; add --resize-mask to resize it"
            )
        masks[index] = resize_mask(labels, video.size) if labels.shape != video.size else labels
    if len(masks) == video.frame_count:
        warnings.warn("every frame has a given mask: nothing is left to track", stacklevel=1)
    return masks


def _bytes(option: str, text: str | None) -> int | None:
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
