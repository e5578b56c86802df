"""`stm track LIST`: many videos by one command, spread over the processes that torchrun starts."""

import contextlib
import dataclasses
import functools
import json
import re
import shlex
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from stm_model import STM
from stm_model.commands.exits import BAD_INPUT, fail, interrupted
from stm_model.commands.part import asked
from stm_model.commands.track import TrackConfig, finished, make_tracker, track_video
from stm_model.distributed import Ranks
from stm_model.io.files import locked, write_json
from stm_model.io.video import open_video
from stm_model.progress import Progress
from stm_model.runtime import is_out_of_memory, one_line
from stm_model.tracking.folder import INTERRUPTED, SUMMARY, is_output_of, plain_settings

COMMAND = "track list"
MANIFEST = "results.jsonl"
"""In the folder of results: a line a video that was tracked, or failed, appended when it ended."""


class ListedVideo(NamedTuple):
    """One line of a list."""

    name: str  # its folder among the results
    video: Path
    mask: Path


class Job(NamedTuple):
    """One video with all settings."""

    name: str
    config: TrackConfig  # for this video alone
    earlier: dict[str, Any] | None  # summary of an earlier run that finished it with the same settings
    frames: int  # as far as it is known, of what is left to do


def read_list(path: Path) -> list[ListedVideo]:
    """Read a list of videos: on each line a video, its mask and, if it should not be called as the video is, a name.

    Paths are relative to the list's folder, those with spaces stand in quotes; # starts a comment. Raises a ValueError
    that names the line.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = list(file)
    except (UnicodeDecodeError, IsADirectoryError):
        raise ValueError(f"{path}: expected a text file that lists videos; a single video needs its --mask") from None
    found: dict[str, tuple[int, ListedVideo]] = {}
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(re.split(r"(?:^|\s)#", line, maxsplit=1)[0])
            if not words:
                continue
            listed = _listed(words, path.parent)
            if listed.name in found:
                raise ValueError(f"{listed.name} is the name of line {found[listed.name][0]}; add another one")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        found[listed.name] = number, listed
    if not found:
        raise ValueError(f"{path}: expected at least one video, got none")
    return [listed for _, listed in found.values()]


def _listed(words: list[str], folder: Path) -> ListedVideo:
    if not 2 <= len(words) <= 3:
        raise ValueError(f"expected VIDEO MASK [NAME] (quotes around spaces), got {len(words)} words")
    video, mask = ((folder / word).resolve() for word in words[:2])
    name = words[2] if len(words) == 3 else video.name if video.is_dir() else video.stem
    if Path(name).name != name or name in ("", "..", SUMMARY, MANIFEST):
        raise ValueError(f"expected the name of a folder among the results, got {name!r}")
    return ListedVideo(name, video, mask)


def track_all(config: TrackConfig) -> int:
    """Track the videos of a list and print what became of each; the exit code."""
    try:
        summary = track_list(config)
    except KeyboardInterrupt:
        return interrupted(f"interrupted; what is done is kept in {config.out}, and the same command goes on")
    if Ranks().first:
        print(json.dumps(summary, indent=2) if config.json else describe(summary))
        for name, record in summary["videos"].items():
            if record["state"] == "failed":
                fail(f"{name}: {record['reason']}", BAD_INPUT)
    return BAD_INPUT if summary["failed"] else 0


def track_list(config: TrackConfig) -> dict[str, Any]:
    """Track the videos of a list, each into a folder of its own; what an earlier run finished is left as it is.

    Returns what summary.json holds, in every process. Raises a ValueError where the list or the settings make no sense,
    or earlier results had others, and KeyboardInterrupt also after the video at hand was interrupted; what is done is
    kept.
    """
    shard = read_shard(config.shard)
    # jobs of one array share a folder, but no video, each of which has a lock of its own
    lock = locked(config.out) if shard == (1, 1) else contextlib.nullcontext()
    with Ranks() as ranks, lock if ranks.first else contextlib.nullcontext():
        device = ranks.device(config.device)
        load = functools.cache(lambda: STM.load(config.checkpoint, device=device, dtype=config.dtype))
        jobs = ranks.on_first(lambda: _prepare(config, load))
        records = {job.name: _record(job.earlier) | {"earlier": True} for job in jobs if job.earlier}
        mine = ranks.share([job for job in jobs if not job.earlier], lambda job: max(job.frames, 1))

        def work() -> dict[str, dict[str, Any]]:
            for number, job in enumerate(mine, 1):
                title = f"{job.name} ({number}/{len(mine)})" if ranks.first else None
                record = _track(dataclasses.replace(job.config, device=device), load, title)
                records[job.name] = record | {"rank": ranks.index}
                _append(config, job, records[job.name])
            return records

        try:
            for others in ranks.each(work):
                records |= others
        except KeyboardInterrupt:
            if ranks.first:
                _write_summary(config, jobs, records, INTERRUPTED)
            raise
        return ranks.on_first(lambda: _write_summary(config, jobs, records, None))


def _prepare(config: TrackConfig, load: Callable[[], STM]) -> list[Job]:
    """Refuse what can be refused before anything is written, and see what is left to do."""
    asked(config)
    first, step = read_shard(config.shard)
    listed = read_list(Path(config.video))[first - 1 :: step]
    ours = (config.out / MANIFEST).is_file() or is_output_of(COMMAND, config.out)
    if not config.overwrite and not ours:
        raise ValueError(f"--out {config.out}: holds something other than results of a list; choose another folder")
    configs = {
        name: dataclasses.replace(config, video=video, mask=mask, out=config.out / name, resume=not config.overwrite)
        for name, video, mask in listed
    }
    earlier = {name: None if config.overwrite else finished(own) for name, own in configs.items()}
    make_tracker(config, load())
    jobs = [
        Job(name, own, earlier[name], 0 if earlier[name] else _length(Path(own.video)))
        for name, own in Progress(configs.items(), desc="open", unit="video")
    ]
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / MANIFEST).touch()
    _write_summary(config, jobs, {}, "unfinished")
    return jobs


def read_shard(text: str | None) -> tuple[int, int]:
    """Job i of n of `i/n`; 1 of 1 without. Raises a ValueError where it makes no sense."""
    found = re.fullmatch(r"(\d+)/(\d+)", text or "1/1")
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--shard: expected i/n with i from 1 to n, as 2/8, got {text}")
    return int(found[1]), int(found[2])


def _append(config: TrackConfig, job: Job, record: dict[str, Any]) -> None:
    """A line at the end of the manifest, in one piece: others may append at the same time."""
    line = {"name": job.name, "video": str(job.config.video), "out": str(job.config.out)} | record
    line |= {"shard": config.shard, "ended": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    with open(config.out / MANIFEST, "ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


def _length(video: Path) -> int:
    try:
        return open_video(video).frame_count or 0
    except (ValueError, OSError):
        return 0  # it fails in its turn, and says why


def _track(config: TrackConfig, load: Callable[[], STM], title: str | None) -> dict[str, Any]:
    """Track one video; its record, whatever becomes of it."""
    try:
        with locked(config.out):
            run = track_video(config, load(), title, announce=False)
            run.write_summary()
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)) and not is_out_of_memory(error):
            traceback.print_exc()  # a bug of ours
        return _record({"stopped": one_line(error), "frames": 0, "fps": None})
    if run.summary["stopped"] == INTERRUPTED:
        raise KeyboardInterrupt
    return _record(run.summary)


def _record(summary: dict[str, Any]) -> dict[str, Any]:
    stopped = summary["stopped"]
    state = "failed" if stopped else "done"
    return {"state": state, "reason": stopped, "frames": summary["frames"], "fps": summary["fps"]}


def _write_summary(
    config: TrackConfig, jobs: list[Job], records: dict[str, Any], stopped: str | None
) -> dict[str, Any]:
    missing = {"state": "unfinished", "reason": None, "frames": 0, "fps": None}
    videos = {job.name: {"earlier": False, "rank": None} | records.get(job.name, missing) for job in jobs}
    states = [record["state"] for record in videos.values()]
    summary = {
        "command": COMMAND,
        "stopped": stopped,
        "done": states.count("done"),
        "failed": states.count("failed"),
        "frames": sum(record["frames"] for record in videos.values()),
        "videos": videos,
        "settings": plain_settings(config),
    }
    name = f"summary-{config.shard.replace('/', '-of-')}.json" if config.shard else SUMMARY
    write_json(config.out / name, summary)
    return summary


def describe(summary: dict[str, Any]) -> str:
    """A summary as the lines that the command prints."""
    width = max(map(len, summary["videos"]), default=0)
    lines = []
    for name, record in summary["videos"].items():
        speed = f", {record['fps']:.2f} frames a second" if record["fps"] else ""
        earlier = " (earlier)" if record["earlier"] else ""
        lines.append(f"{name:{width}}  {record['state']:6}  {record['frames']} frames{speed}{earlier}")
    lines.append(f"{summary['done']} of {len(summary['videos'])} videos done, {summary['failed']} failed")
    return "\n".join([*lines, f"written to {summary['settings']['out']}"])
