"""One video tracked into a folder: masks, overlay, and the summary of how it went."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch, PyAV and the model are imported where they are used: `stm --help` answers at once
if TYPE_CHECKING:
    import numpy as np

    from stm_model.tracker import Tracker

BAD_INPUT, INTERRUPTED = 2, 130
OUTPUTS = ("masks", "overlay.mp4", "contact_sheet.png", "summary.json")


class Run:
    """One video tracked into a folder: masks, overlay and the summary of how it went."""

    def __init__(self, command: str, out: Path, tracker: Tracker, settings: dict[str, Any]):
        self.out, self.tracker = out, tracker
        parameter = next(tracker.model.parameters())
        self.summary: dict[str, Any] = {
            "command": command,
            "frames": 0,
            "objects": [],
            "size": None,
            "fps": None,
            "seconds": {},
            "peak_memory_bytes": {},
            "device": str(parameter.device),
            "dtype": dtype_name(parameter.dtype),
            "stopped": "unfinished",
            "files": {"masks": str(out / "masks"), "summary": str(out / "summary.json")},
            "settings": {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
        }

    def track(self, frames, masks: dict[int, np.ndarray], *, count: int | None, fps, write_overlay: bool) -> int:
        """Track and write; the exit code. Whatever stops it half-way, the masks and the overlay so far stay."""
        from tqdm import tqdm

        from stm_model.media import BrokenVideo, VideoWriter
        from stm_model.pictures import overlay, write_mask

        _clear_output(self.out)
        (self.out / "masks").mkdir(parents=True, exist_ok=True)
        self._write_summary()  # a run that is killed is marked as unfinished
        feed, started, code = _Feed(frames), time.perf_counter(), 0
        writer = VideoWriter(self.out / "overlay.mp4", fps) if write_overlay else contextlib.nullcontext()
        results = _timed(self.tracker.track(feed, masks, frame_count=count), self.summary["seconds"])
        try:
            with writer, tqdm(total=count, desc="track", unit="frame", delay=1, disable=None) as progress:
                for result in results:
                    write_mask(self.out / "masks" / f"{result.index:05d}.png", result.labels)
                    self.summary["frames"], self.summary["objects"] = result.index + 1, list(result.objects)
                    if write_overlay:
                        writer.write(overlay(feed.last, result.labels))
                    progress.update()
            self.summary["stopped"] = None
        except (BrokenVideo, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            if not self.summary["frames"]:
                raise
            code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else BAD_INPUT
            self.summary["stopped"] = "interrupted" if code == INTERRUPTED else one_line(error)
        if write_overlay:
            self.summary["files"]["overlay"] = str(self.out / "overlay.mp4")
        self._measure(feed, time.perf_counter() - started)
        return code

    def _measure(self, feed: _Feed, wall: float) -> None:
        import torch

        seconds = self.summary["seconds"]
        # the tracker pulls its frames itself: what they took to decode is not tracking
        seconds.update(tracking=seconds["tracking"] - feed.seconds, decoding=feed.seconds, wall=wall)
        self.summary["fps"] = self.summary["frames"] / max(seconds["tracking"], 1e-9)
        self.summary["size"] = list(feed.last.shape[:2])
        self.summary["peak_memory_bytes"]["process"] = _peak_process_memory()
        if torch.device(self.summary["device"]).type == "cuda":
            self.summary["peak_memory_bytes"]["device"] = torch.cuda.max_memory_allocated(self.summary["device"])

    def report(self, code: int, as_json: bool) -> int:
        """Write summary.json, print the summary and, if the run stopped early, why; returns the exit code."""
        self._write_summary()
        if as_json:
            print(json.dumps(self.summary, indent=2))
        else:
            self._print()
        if code:
            kept = f"the masks of {self.summary['frames']} frames are kept in {self.out}"
            return fail(f"{self.summary['stopped']}; {kept}", code)
        return code

    def _write_summary(self) -> None:
        (self.out / "summary.json").write_text(json.dumps(self.summary, indent=2) + "\n")

    def _print(self) -> None:
        summary, seconds = self.summary, self.summary["seconds"]
        memory = ", ".join(
            f"{size / 2**20:.0f} MiB ({kind})" for kind, size in summary["peak_memory_bytes"].items() if size
        )
        print(f"frames      {summary['frames']} of {summary['size'][1]}x{summary['size'][0]} pixels")
        print(f"objects     {len(summary['objects'])} (labels {', '.join(map(str, summary['objects'])) or 'none yet'})")
        print(f"speed       {summary['fps']:.2f} frames a second tracking; {seconds['wall']:.1f} s in all")
        print(f"ran on      {summary['device']} in {summary['dtype']}")
        print(f"peak memory {memory or 'unknown'}")
        for name, value in summary.get("scores", {}).items():
            print(f"{name:11} {value:.3f}")
        for name, path in summary["files"].items():
            print(f"{name.replace('_', ' '):13} {path}")


class _Feed:
    """Hands frames on, counts the seconds they take to come and remembers the last one."""

    def __init__(self, frames):
        self.frames, self.seconds, self.last = frames, 0.0, None

    def __iter__(self) -> Iterator[np.ndarray]:
        source = iter(self.frames)
        while True:
            started = time.perf_counter()
            try:
                self.last = next(source)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - started
            yield self.last


def _timed(results: Iterator, seconds: dict[str, float]) -> Iterator:
    seconds["tracking"] = 0.0
    while True:
        started = time.perf_counter()
        try:
            result = next(results)
        except StopIteration:
            return
        finally:
            seconds["tracking"] += time.perf_counter() - started
        yield result


def is_output_of(command: str, out: Path) -> bool:
    """Whether a folder is missing, empty, or was written by `command`."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return True
    try:
        return json.loads((out / "summary.json").read_text())["command"] == command
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _clear_output(out: Path) -> None:
    """Remove what an earlier run wrote into a folder, and nothing else."""
    masks = [file for file in (out / "masks").glob("*.png") if file.stem.isdigit()]
    partial = [*out.glob(".*.partial.*"), *out.glob("masks/.*.partial.*")]
    for file in [*masks, *partial, *(out / name for name in OUTPUTS if name != "masks")]:
        file.unlink(missing_ok=True)


def _peak_process_memory() -> int | None:
    """Most memory this process ever held, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def dtype_name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).strip().partition("\n")[0].split()) or type(error).__name__


def fail(message: str, code: int) -> int:
    print(f"stm: error: {message}", file=sys.stderr)
    return code
