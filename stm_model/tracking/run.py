"""One video tracked into a folder: masks, overlay, and the summary of how it went."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stm_model.io.files import write_json
from stm_model.io.threads import Ahead, Behind

# torch, PyAV and the model are imported where they are used: `stm --help` answers at once
if TYPE_CHECKING:
    import numpy as np

    from stm_model.tracking.resume import Checkpoint
    from stm_model.tracking.tracker import FrameResult, Tracker

BAD_INPUT, INTERRUPTED = 2, 130
CHECKPOINT = "checkpoint.pt"
OUTPUTS = ("masks", "overlay.mp4", "contact_sheet.png", "summary.json", CHECKPOINT)


class Run:
    """One video tracked into a folder: masks, overlay and the summary of how it went."""

    def __init__(self, command: str, out: Path, tracker: Tracker, settings: Any):
        self.out, self.tracker = out, tracker
        # seconds of the run that this one goes on with
        self._earlier: dict[str, float] = {}
        parameter = next(tracker.model.parameters())
        self.summary: dict[str, Any] = {
            "command": command,
            "frames": 0,
            "objects": [],
            "signals": {},
            "size": None,
            "fps": None,
            "seconds": {},
            "peak_memory_bytes": {},
            "device": str(parameter.device),
            "dtype": dtype_name(parameter.dtype),
            "stopped": "unfinished",
            "files": {"masks": str(out / "masks"), "summary": str(out / "summary.json")},
            "settings": plain_settings(settings),
        }

    def track(
        self,
        frames,
        masks: dict[int, np.ndarray],
        *,
        count: int | None,
        fps,
        write_overlay: bool,
        title: str | None = "track",
        beforehand: Sequence[str] = (),
        checkpoint: Checkpoint | None = None,
        saved: dict[str, Any] | None = None,
    ) -> int:
        """Track and write; the exit code. Whatever stops it half-way, the masks and the overlay so far stay.

        `title` stands before the bar of progress; None shows no bar. The lines `beforehand` are printed once nothing
        that was given can be refused any more. `checkpoint` is written when it is due; `saved` is what an earlier run
        wrote there, to go on from it.
        """
        from tqdm import tqdm

        from stm_model.io.video import BrokenVideo

        feed, writer = Ahead(frames), Behind(lambda items: self._write(items, fps if write_overlay else None))
        bar = tqdm(total=count, desc=title, unit="frame", delay=1, disable=True if title is None else None)
        done = self._take_up(saved) if saved else 0
        source = _Source(feed, done, lambda *frame: (writer.put((*frame, None, ())), bar.update()))
        results = self.tracker.track(source, masks, frame_count=count, resume=saved and saved["tracker"])
        self._clear(done)
        for line in beforehand:
            print(line, flush=True)
        code, started, timer = 0, time.perf_counter(), _Timer(results)

        def seconds() -> dict[str, float]:
            # the tracker pulls its frames itself: what it waits for them is not tracking
            now = {"tracking": timer.seconds - source.waited, "waiting": source.waited, "decoding": feed.busy}
            now |= {"writing": writer.busy, "wall": time.perf_counter() - started}
            return {name: value + self._earlier.get(name, 0.0) for name, value in now.items()}

        try:
            with feed, writer, bar:
                for result in timer:
                    self._note(result)
                    writer.put((result.index, source.last, result.labels, result.objects))
                    bar.update()
                    if checkpoint is not None and checkpoint.due():
                        # it speaks of masks that are written
                        writer.settle()
                        checkpoint.write(self._state(seconds()))
            self.summary["stopped"] = None
        except (BrokenVideo, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
            code = self._stopped_by(error)
        if write_overlay:
            self.summary["files"]["overlay"] = str(self.out / "overlay.mp4")
        self._measure(seconds())
        return code

    def _stopped_by(self, error: BaseException) -> int:
        """Note why the run ends; the exit code. Raises what is a bug of ours, or stopped it before there was a mask."""
        if not self.summary["frames"] or (isinstance(error, RuntimeError) and not is_out_of_memory(error)):
            raise error
        self.summary["stopped"] = "interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else BAD_INPUT

    def _take_up(self, saved: dict[str, Any]) -> int:
        """Be where an earlier run was when it wrote this; how many frames it had tracked."""
        done = saved["summary"]["frames"]
        for index in range(done):
            if not self._mask_file(index).is_file():
                raise ValueError(f"{self._mask_file(index)}: is gone, without it the run can't go on")
        self.summary |= saved["summary"]
        self._earlier = saved["seconds"]
        return done

    def _state(self, seconds: dict[str, float]) -> dict[str, Any]:
        """What `_take_up` needs, and the tracker."""
        summary = {name: self.summary[name] for name in ("frames", "objects", "size", "signals")}
        return {"tracker": self.tracker.checkpoint(), "summary": summary, "seconds": seconds}

    def _clear(self, done: int) -> None:
        """Make ready for masks from frame `done` on: what an earlier run wrote goes, nothing else does."""
        self.out.mkdir(parents=True, exist_ok=True)
        # says at any time whose results these are, and that a run that is killed is unfinished
        self.write_summary()
        masks = [file for file in (self.out / "masks").glob("*.png") if file.stem.isdigit() and int(file.stem) >= done]
        partial = [*self.out.glob(".*.partial.*"), *self.out.glob("masks/.*.partial.*")]
        others = ["overlay.mp4", "contact_sheet.png"] if done else ["overlay.mp4", "contact_sheet.png", CHECKPOINT]
        for file in [*masks, *partial, *(self.out / name for name in others)]:
            file.unlink(missing_ok=True)
        (self.out / "masks").mkdir(exist_ok=True)

    def _mask_file(self, index: int) -> Path:
        return self.out / "masks" / f"{index:05d}.png"

    def _note(self, result: FrameResult) -> None:
        """Note how large and how certain each mask is, how familiar what it covers, and where it is likely lost."""
        from stm_model.tracking.tracker import UNCERTAIN

        self.summary["size"] = list(result.labels.shape)
        signals = self.summary["signals"]
        values = zip(result.objects, result.certainty, result.familiarity, strict=True)
        for label, certainty, familiarity in values:
            noted = signals.setdefault(
                str(label), {"from": result.index, "area": [], "certainty": [], "familiarity": [], "uncertain": []}
            )
            noted["area"].append(round(float((result.labels == label).mean()), 6))
            noted["certainty"].append(round(certainty, 4))
            # JSON has no infinity
            noted["familiarity"].append(round(familiarity, 4) if math.isfinite(familiarity) else None)
            if certainty < UNCERTAIN:
                noted["uncertain"].append(result.index)

    def _write(self, items: Iterator[tuple[int, np.ndarray, np.ndarray | None, tuple[int, ...]]], fps) -> None:
        """Write the masks, and the overlay if it has a frame rate, of (index, frame, labels, objects) as they come; the
        mask of a frame without labels is there.
        """
        from stm_model.io.images import overlay, read_mask, write_mask
        from stm_model.io.video import VideoWriter

        with contextlib.nullcontext() if fps is None else VideoWriter(self.out / "overlay.mp4", fps) as video:
            for index, frame, labels, objects in items:
                if labels is not None:
                    write_mask(self._mask_file(index), labels)
                    self.summary["frames"], self.summary["objects"] = index + 1, list(objects)
                if video is not None:
                    video.write(overlay(frame, read_mask(self._mask_file(index)) if labels is None else labels))

    def _measure(self, seconds: dict[str, float]) -> None:
        import torch

        from stm_model.runtime import peak_process_memory

        self.summary["seconds"] = seconds
        self.summary["fps"] = self.summary["frames"] / max(seconds["tracking"], 1e-9)
        self.summary["peak_memory_bytes"]["process"] = peak_process_memory()
        if torch.device(self.summary["device"]).type == "cuda":
            self.summary["peak_memory_bytes"]["device"] = torch.cuda.max_memory_allocated(self.summary["device"])

    def report(self, code: int, as_json: bool) -> int:
        """Write summary.json, print the summary and, if the run stopped early, why; returns the exit code."""
        self.write_summary()
        if as_json:
            print(json.dumps(self.summary, indent=2))
        else:
            self._print()
        if code:
            kept = f"the masks of {self.summary['frames']} frames are kept in {self.out}"
            if (self.out / CHECKPOINT).exists():
                kept += "; --resume goes on"
            return fail(f"{self.summary['stopped']}; {kept}", code)
        return code

    def write_summary(self) -> None:
        """Write summary.json; a run that is finished needs no checkpoint any more."""
        write_json(self.out / "summary.json", self.summary)
        if self.summary["stopped"] is None:
            (self.out / CHECKPOINT).unlink(missing_ok=True)

    def _print(self) -> None:
        summary, seconds = self.summary, self.summary["seconds"]
        memory = ", ".join(
            f"{size / 2**20:.0f} MiB ({kind})" for kind, size in summary["peak_memory_bytes"].items() if size
        )
        print(f"frames      {summary['frames']} of {summary['size'][1]}x{summary['size'][0]} pixels")
        print(f"objects     {len(summary['objects'])} (labels {', '.join(map(str, summary['objects'])) or 'none yet'})")
        for label, noted in summary["signals"].items():
            if noted["uncertain"]:
                print(f"lost?       object {label} in {len(noted['uncertain'])} frames from {noted['uncertain'][0]} on")
        print(f"speed       {summary['fps']:.2f} frames a second tracking; {seconds['wall']:.1f} s in all")
        print(f"ran on      {summary['device']} in {summary['dtype']}")
        print(f"peak memory {memory or 'unknown'}")
        for name, value in summary.get("scores", {}).items():
            print(f"{name:11} {value:.3f}")
        for name, path in summary["files"].items():
            print(f"{name.replace('_', ' '):13} {path}")


class _Source:
    """The frames of a video on their way to the tracker; those that have a mask already are said to `again`."""

    def __init__(self, frames: Iterable[np.ndarray], done: int, again: Callable[[int, np.ndarray], Any]):
        self.frames, self.done, self.again = frames, done, again
        self.last: np.ndarray | None = None
        """The frame handed out last."""
        self.waited = 0.0
        """Seconds until frames came, and were taken by `again`."""

    def __iter__(self) -> Iterator[np.ndarray]:
        frames = enumerate(self.frames)
        while True:
            started = time.perf_counter()
            try:
                index, self.last = next(frames)
                if index < self.done:
                    self.again(index, self.last)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - started
            yield self.last


class _Timer:
    """Results of the tracker, and the seconds until they came."""

    def __init__(self, results: Iterator[FrameResult]):
        self.results, self.seconds = results, 0.0

    def __iter__(self) -> Iterator[FrameResult]:
        while True:
            started = time.perf_counter()
            try:
                result = next(self.results)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - started
            yield result


def is_output_of(command: str, out: Path) -> bool:
    """Whether a folder is missing, empty, or was written by `command`."""
    # a run that is killed as it begins leaves no more than a file's temporary name
    if not out.exists() or (out.is_dir() and all(".partial" in file.name for file in out.iterdir())):
        return True
    try:
        return json.loads((out / "summary.json").read_text())["command"] == command
    except (OSError, ValueError, KeyError, TypeError):
        return False


def plain_settings(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass of settings as JSON takes them."""
    fields = dataclasses.asdict(settings)
    return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}


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
