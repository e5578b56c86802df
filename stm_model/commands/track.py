"""`stm track` on one video: what was given is checked, the network loaded, the video tracked into a folder."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from stm_model.commands.exits import BAD_INPUT, fail, interrupted, option_bytes
from stm_model.commands.part import PartOptions, check_live, masks_of, part_of
from stm_model.runtime import STDIN, NetworkOptions, is_live, one_line

# torch, PyAV and the model are imported where they are used: `stm track --help` answers at once
if TYPE_CHECKING:
    import numpy as np

    from stm_model import STM, Tracker
    from stm_model.io.live import LiveVideo
    from stm_model.io.part import Part
    from stm_model.io.video import Video
    from stm_model.tracking.folder import FolderRun


@dataclass(frozen=True)
class TrackConfig(NetworkOptions, PartOptions):
    """Track the objects of a mask through a video.

    Writes masks/00000.png … (labels as in the mask), overlay.mp4 and summary.json into the --out folder.
    """

    video: tyro.conf.Positional[str | Path]
    """A video file, a folder of frames, or live input: - for stdin (y4m, mjpeg, …), /dev/video0, rtsp://… Without
    --mask a text file that lists videos, VIDEO MASK [NAME] on each line."""
    out: Path
    """Folder for the results; for those of a list a folder of folders."""
    mask: Path | None = None
    """Labels of the first frame, a palette or grey PNG: 0 is background, 255 void (unknown). Or a folder of such masks
    named by frame number, or a file of COCO, CVAT, LabelMe or SAM 2."""
    both_ways: bool = False
    """Track backwards too, from the masks of later frames to the start. Twice the time."""
    memory: str | None = None
    """Which frames are remembered: first, previous, first+previous, every:N (with both), first+every:N or uniform:K.
    None takes first+every:5 where the decoder sees the previous masks, else every:5."""
    compile: bool = False
    """Compile the network first: minutes, then less time a frame."""
    memory_budget: str | None = None
    """How much may be remembered on the device, like 2GiB; None keeps all, on the host where the device is full."""
    host_budget: str | None = None
    """How much beyond that may be remembered in the host's memory, like 16GiB."""
    eviction: Literal["use", "fifo"] = "use"
    """What goes where the budget is full: the positions that reads use least, or the oldest frame."""
    memory_share: float | None = None
    """Keep this share of all remembered positions, at least one frame's, those that reads use; in place of a budget."""
    spacing: int | None = None
    """Where no object is near, remember every so many rows and columns alone; 1 is all. None takes 2 where the decoder
    sees the previous masks and there is no budget, else 1."""
    skip_uncertain: bool = False
    """Don't keep frames in which an object is likely lost."""
    top_k: int | None = None
    """Read only so many remembered positions for each pixel of the feature map, the best; None reads all."""
    skip: float = 0.0
    """Softmax mass that each pixel's read of the memory may drop to be faster, from 0 (exact) to below 1."""
    binary: bool = False
    """The mask is black and white: what is bright is label 1."""
    colors: bool = False
    """Each color of the mask is an object, however many and thin; an RGB picture's are labels 1, 2, …"""
    resize_mask: bool = False
    """Resize masks that are not of the video's size, instead of refusing them."""
    overlay: bool = True
    """Write overlay.mp4, the video with the objects colored, and its sound."""
    overlay_style: Literal["fill", "outline", "side-by-side"] = "fill"
    """How it shows them: filled, by their outlines, or filled beside the video as it is."""
    export: tuple[str, ...] = ()
    """Write these formats as well: coco, ytvis, mots, cvat, labelme, yolo, alpha, alpha-mov, alpha-webm, matte,
    matte-webm, exr."""
    live: Literal["newest", "every"] | None = None
    """Of live input, track the newest frame and drop older unread ones, or every frame while the source waits. None
    takes every of stdin, newest of cameras and streams."""
    stream: Literal["y4m", "png"] | None = None
    """Write the masks to stdout, not to files: labels as grey y4m, or PNG after PNG."""
    overwrite: bool = False
    """Replace earlier results in a folder that is not empty; other files in it stay. Without it a list goes on."""
    resume: bool = False
    """Go on with a run that was stopped, from its saved state in the --out folder, if any. A list always does."""
    save_every: float = 60.0
    """Seconds between saved states, more where writing takes over 2 % of them; 0 for none."""
    shard: str | None = None
    """Of a list, the videos of job i of n, as 1/8, 2/8, …: job arrays with one --out."""
    json: bool = False
    """Print the summary as JSON, alone on stdout."""


SAME_RESULTS = frozenset({"out", "device", "overwrite", "json", "resume", "save_every", "shard"})
"""Settings that a result does not depend on."""


LIVE_FRAMES = 10
"""Positions of so many frames, besides those with given masks, are remembered of live input, which has no end, unless
the user says otherwise: the more are read, the fewer frames are tracked each second."""


def named(config: TrackConfig) -> TrackConfig:
    """The video as a path, unless it is live input; that needs a mask."""
    if not is_live(config.video):
        return dataclasses.replace(config, video=Path(config.video))
    if config.mask is None:
        raise ValueError(f"{config.video}: live input needs the --mask of its first frame")
    return config


def track(config: TrackConfig) -> int:
    """Track one video and print its summary; the exit code."""
    from stm_model.io.files import locked

    with locked(config.out):
        if config.resume and not config.overwrite and (summary := finished(config)):
            done = f"{summary['frames']} frames are tracked and in {config.out}: nothing is left to do"
            print(json.dumps(summary, indent=2) if config.json else done)
            return 0
        return report(track_video(config), config.json)


def track_video(
    config: TrackConfig, model: STM | None = None, title: str | None = "track", announce: bool = True
) -> FolderRun:
    """Track one video into its folder, with a model or the one of the settings; the summary is still to be written.

    The folder is `locked`.

    No `title`, no progress bar; `announce` prints what will be remembered. Raises a ValueError or OSError where the
    input or a setting makes no sense; nothing was written then.
    """
    from stm_model.io.formats.table import TRACKED, Exports, check_formats
    from stm_model.io.masks import MaskStream
    from stm_model.runtime import chosen_side
    from stm_model.tracking.folder import BACKWARD, RESUME_FILE, FolderRun
    from stm_model.tracking.resume import ResumeFile

    check_formats(config.export, "--export", TRACKED)
    check_output(config)
    part = part_of(config, _opened(config))
    masks = _given_masks(config, part)
    side = chosen_side(config.size, config.checkpoint, part.size, masks)
    tracker = make_tracker(dataclasses.replace(config, size=side), model)
    if isinstance(config.video, str) and config.memory_budget is None and config.memory_share is None:
        frames = LIVE_FRAMES + len(masks)
        device = tracker.plan(part.size, frames, masks).paged_bytes(frames)
        tracker.budget = dataclasses.replace(tracker.budget, device=device)
    stream = MaskStream(sys.stdout.buffer, config.stream, part.fps) if config.stream else None
    run = FolderRun("track", config.out, tracker, config, config.overlay_style, stream)
    resume_file = backward_file = saved = None
    if not isinstance(config.video, str) and not config.stream:
        resume_file = ResumeFile(config.out / RESUME_FILE, config.save_every, config.video, part.settings)
        saved = resume_file.read() if config.resume else None
    if config.both_ways:
        path = config.out / BACKWARD / RESUME_FILE
        backward_file = ResumeFile(path, config.save_every, Path(config.video), part.settings)
        if config.resume:
            backward_file.read()
    # a video of unknown length is tracked all the same
    plan = None if part.frame_count is None else tracker.plan(part.size, part.frame_count, masks)
    done = saved["summary"]["frames"] if saved else 0
    lines = [f"remembers   {plan}"] if plan else []
    lines += [f"goes on     after {done} frames"] if saved else []
    run.track(
        part,
        masks,
        overlay=config.overlay,
        exports=Exports(config.export, config.out, part.clip, part.numbers[:done]) if config.export else None,
        title=title,
        announce=lines if announce and not config.json and not config.stream else (),
        resume_file=resume_file,
        backward_file=backward_file,
    )
    assert tracker.bank is not None
    planned = {"rule": str(tracker.memory), "planned": plan and str(plan)}
    memory = {**planned, "most_bytes": tracker.bank.most, **tracker.bank.summary()}
    run.summary["memory"] = memory
    return run


def finished(config: TrackConfig) -> dict[str, Any] | None:
    """The summary of an earlier run that finished this video with these settings; None if none did.

    Raises a ValueError where the folder holds something else, or names the first setting that differs.
    """
    from stm_model.tracking.folder import RESUME_FILE, SUMMARY, is_output_of, plain_settings
    from stm_model.tracking.resume import check_format

    if not is_output_of("track", config.out):
        raise ValueError(f"{config.out}: holds something other than results; choose another --out, or add --overwrite")
    file = config.out / SUMMARY
    if not file.is_file():
        return None
    summary = json.loads(file.read_text())
    check_format(config.out, summary.get("format"))
    if summary["stopped"] is not None:
        return None
    defaults = {field.name: field.default for field in dataclasses.fields(config)} | {"export": []}
    for name, value in plain_settings(config).items():
        # a setting that there was not yet had its default
        found = summary["settings"].get(name, defaults.get(name))
        if isinstance(getattr(config, name), Path) and isinstance(found, str):
            # as earlier versions wrote it
            found = str(Path(found).resolve())
        if name not in SAME_RESULTS and found != value:
            raise ValueError(
                f"{config.out}: was tracked with --{name.replace('_', '-')} {found}, now it is {value}; choose another "
                "--out, or add --overwrite"
            )
    # a run that is killed at its very end leaves it
    (config.out / RESUME_FILE).unlink(missing_ok=True)
    return summary


def make_tracker(config: TrackConfig, model: STM | None = None) -> Tracker:
    """A tracker with these settings. Raises a ValueError that names the one that makes no sense."""
    from stm_model import STM, Tracker
    from stm_model.tracking.budget import MemoryBudget

    device, host = option_bytes(config, "memory_budget"), option_bytes(config, "host_budget")
    return Tracker(
        model or STM.load(config.checkpoint, device=config.device, dtype=config.dtype),
        memory=config.memory,
        size=config.size,
        budget=MemoryBudget(device, host, config.eviction, config.memory_share),
        spacing=config.spacing,
        skip_uncertain=config.skip_uncertain,
        compiled=config.compile,
        # the next frame of live input is not there yet
        ahead=not isinstance(config.video, str),
        top_k=config.top_k,
        skip=config.skip,
    )


def check_output(config: TrackConfig) -> None:
    """Raise a ValueError where results would replace something they should not."""
    from stm_model.io.files import is_empty
    from stm_model.tracking.folder import OUTPUTS

    if config.both_ways and isinstance(config.video, str):
        raise ValueError(f"--both-ways: expected a video that can be read backwards, got live input, {config.video}")
    if config.resume and (config.stream or isinstance(config.video, str)):
        raise ValueError("--resume: expected a video file and masks in files; live input and --stream are gone")
    if config.json and config.stream:
        raise ValueError("--json and --stream both write to stdout; choose one of them")
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on with what --overwrite replaces; choose one of them")
    if config.resume:
        finished(config)
    elif not is_empty(config.out) and not config.overwrite:
        raise ValueError(f"--out {config.out}: is not empty; choose another folder, or add --overwrite or --resume")
    ours = {(config.out / name).resolve() for name in OUTPUTS}
    for name in ("video", "mask"):
        path = Path(getattr(config, name)).resolve()
        if ours & {path, *path.parents}:
            raise ValueError(f"--out {config.out}: the results would overwrite the {name}; choose another folder")


def _opened(config: TrackConfig) -> Video | LiveVideo:
    from stm_model.io.live import LiveVideo
    from stm_model.io.video import open_video

    if isinstance(config.video, str):
        check_live(config, config.video)
        return LiveVideo(config.video, (config.live or ("every" if config.video == STDIN else "newest")) == "every")
    if config.live:
        raise ValueError(f"--live {config.live}: expected live input, got {config.video}")
    return open_video(config.video)


def _given_masks(config: TrackConfig, part: Part) -> dict[int, np.ndarray]:
    """By the part's indices, as the tracker sees them."""
    from stm_model.io.formats.given import read_given
    from stm_model.io.images import width_by_height
    from stm_model.io.live import LiveVideo
    from stm_model.io.masks import resize_mask

    assert config.mask is not None
    if config.binary and config.colors:
        raise ValueError("--binary takes the mask for one object, --colors for one of each color; choose one of them")
    video = part.video
    known = None if isinstance(video, LiveVideo) else video
    given = read_given(config.mask, known, first=part.numbers[0], binary=config.binary, colors=config.colors)
    for index, labels in given.items():
        if labels.shape == video.size:
            continue
        if not config.resize_mask:
            raise ValueError(
                f"{config.mask}: the mask of frame {index} is {width_by_height(labels.shape)} pixels, the video "
                f"{width_by_height(video.size)}; add --resize-mask to resize it"
            )
        (height, width), (video_height, video_width) = labels.shape, video.size
        # the sides' ratios are less alike than those of the mask's turned by 90°
        if abs(math.log(height * video_width / width / video_height)) > abs(
            math.log(width * video_width / height / video_height)
        ):
            raise ValueError(
                f"{config.mask}: the mask of frame {index} is {width_by_height(labels.shape)} pixels, the video "
                f"{width_by_height(video.size)}; expected a mask that is not turned by 90°"
            )
        given[index] = resize_mask(labels, video.size)
    masks = masks_of(part, given, config.mask, late=config.both_ways)
    if (first := min(masks)) and not config.both_ways:
        warnings.warn(
            f"the first mask is for frame {part.numbers[first]}, counted from 0: in the {first} before it all is "
            "background; --both-ways tracks it back to the start",
            stacklevel=1,
        )
    if config.both_ways and not max(masks):
        warnings.warn("--both-ways: no later frame has a mask, so there is nothing to track backwards", stacklevel=1)
    if len(masks) == part.frame_count:
        warnings.warn("every frame has a given mask: nothing is left to track", stacklevel=1)
    return masks


def report(run: FolderRun, as_json: bool) -> int:
    """Write and print a run's summary and, if it stopped early, why; the exit code."""
    from stm_model.tracking import folder

    summary = run.summary
    try:
        run.write_summary()
    except OSError as error:
        # a full disk: what was said of it first counts
        summary["stopped"] = summary["stopped"] or one_line(error)
    # stdout may be a stream of masks
    file = sys.stderr if run.stream else None
    print(json.dumps(summary, indent=2) if as_json else describe(summary), file=file)
    if summary["stopped"] is None:
        return 0
    kept = f"the masks of {summary['frames']} frames are {'on stdout' if run.stream else f'kept in {run.out}'}"
    if (run.out / folder.RESUME_FILE).exists():
        kept += "; --resume goes on"
    line = f"{summary['stopped']}; {kept}"
    return interrupted(line) if summary["stopped"] == folder.INTERRUPTED else fail(line, BAD_INPUT)


def describe(summary: dict[str, Any]) -> str:
    """A summary as the lines that the command prints."""
    from stm_model.io.images import width_by_height

    memory = [f"{size / 2**20:.0f} MiB ({kind})" for kind, size in summary["peak_memory_bytes"].items() if size]
    labels = ", ".join(map(str, summary["objects"])) or "none yet"
    lines = [
        f"frames      {summary['frames']} of {width_by_height(summary['size'])} pixels",
        f"objects     {len(summary['objects'])} (labels {labels})",
    ]
    for label, noted in summary["signals"].items():
        if frames := noted["uncertain"]:
            lines.append(f"lost?       object {label} in {noted['lost']} frames from {frames[0]} on")
    if live := summary.get("live"):
        lost = f", {live['damaged']} damaged" * bool(live["damaged"])
        lost += f", connected again {live['reconnected']} times" * bool(live["reconnected"])
        latency = "" if live["median_latency"] is None else f", median latency {live['median_latency']:.3f} s"
        lines.append(f"live        {live['policy']} kept, {live['dropped']} dropped{lost}{latency}")
    return "\n".join(
        [
            *lines,
            f"speed       {summary['fps']:.2f} frames a second tracking; {summary['seconds']['wall']:.1f} s in all",
            f"ran on      {summary['device']} in {summary['dtype']}",
            f"peak memory {', '.join(memory) or 'unknown'}",
            *(f"{name:11} {value:.3f}" for name, value in summary.get("scores", {}).items()),
            *(f"{name.replace('_', ' '):13} {path}" for name, path in summary["files"].items()),
        ]
    )
