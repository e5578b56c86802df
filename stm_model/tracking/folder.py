"""One video tracked into a folder: masks, overlay, the state to resume from, and the summary of how it went."""

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stm_model.io.damage import BrokenVideo
from stm_model.io.files import is_empty, write_json
from stm_model.io.formats.table import FORMATS, TRACKED, Exports
from stm_model.io.live import LiveVideo
from stm_model.io.masks import MaskStream, read_mask, write_mask
from stm_model.io.overlay import Overlay, Style
from stm_model.io.part import Part
from stm_model.io.threads import Prefetch, Writer
from stm_model.io.video import VideoFile, VideoWriter
from stm_model.progress import Progress
from stm_model.runtime import is_out_of_memory, one_line, peak_process_memory, timed
from stm_model.tracking.both_ways import Backward
from stm_model.tracking.frames import scaled_size
from stm_model.tracking.result import FrameResult
from stm_model.tracking.resume import FORMAT, ResumeFile
from stm_model.tracking.tracker import Tracker
from stm_model.tracking.trust import UNTRUSTED

Written = tuple[int, np.ndarray, "np.ndarray | None", tuple[int, ...]]
"""Index, frame, labels and objects."""

INTERRUPTED = "interrupted"
"""Why a run stopped, in its summary, where the user did it."""
RESUME_FILE, BACKWARD = "resume.pt", "backward"
OVERLAY, SHEET, SUMMARY = "overlay.mp4", "contact_sheet.png", "summary.json"
SIGNALS = "signals.jsonl"
"""Of live input, which has no end: a line a frame, as the summary would grow."""
MOST_UNCERTAIN = 100
"""Of live input, how many of an object's uncertain frames the summary names."""
OUTPUTS = (
    "masks",
    OVERLAY,
    SHEET,
    SUMMARY,
    SIGNALS,
    RESUME_FILE,
    BACKWARD,
    *(FORMATS[name].target for name in TRACKED),
)


class FolderRun:
    """One video tracked into a folder by `command`; the summary records `settings`, a dataclass. Masks go to `stream`
    where there is one.
    """

    def __init__(
        self,
        command: str,
        out: Path,
        tracker: Tracker,
        settings: Any,
        overlay_style: Style = "fill",
        stream: MaskStream | None = None,
    ):
        self.out, self.tracker, self.overlay_style, self.stream = out, tracker, overlay_style, stream
        self.part: Part
        self._began = self._ended = False
        self._seconds = dict.fromkeys(("tracking", "waiting", "decoding", "writing", "wall"), 0.0)
        self.summary: dict[str, Any] = {
            "command": command,
            "format": FORMAT,
            "frames": 0,
            "objects": [],
            "signals": {},
            "size": None,
            "network_size": None,
            "fps": None,
            "seconds": {},
            "peak_memory_bytes": {},
            "device": str(next(tracker.model.parameters()).device),
            "dtype": tracker.model.dtype_name,
            "stopped": "unfinished",
            "files": ({} if stream else {"masks": str(out / "masks")}) | {"summary": str(out / SUMMARY)},
            "settings": plain_settings(settings),
        }

    def track(
        self,
        part: Part,
        masks: Mapping[int, np.ndarray],
        *,
        overlay: bool = True,
        exports: Exports | None = None,
        title: str | None = "track",
        announce: Sequence[str] = (),
        resume_file: ResumeFile | None = None,
        backward_file: ResumeFile | None = None,
    ) -> None:
        """Track and write; `summary["stopped"]` says why it ended early, None if it did not. The masks so far always
        stay.

        Args:
            masks: those given, by the part's indices and as the tracker sees them.
            exports: other formats to write.
            title: stands before the progress bar; None shows no bar.
            announce: lines to print once nothing that was given can be refused any more.
            resume_file: written when it is due; the run goes on from what was read of it.
            backward_file: track backwards too, before; likewise.

        Raises:
            ValueError, OSError: the input is refused, or nothing was tracked; what else is a bug of ours.
        """
        self.part = part
        self.summary["network_size"] = list(scaled_size(part.size, self.tracker.size))
        if names := part.mask_names:
            self.summary["mask_names"] = names
        saved = resume_file.saved if resume_file else None
        done = self._take_up(saved) if saved else 0
        backward = None
        if backward_file is not None:
            backward = Backward(self.out / BACKWARD, masks)
            if not saved:
                self._track_backward(part, backward, backward_file, title)
        spent, started = self._seconds, time.perf_counter() - self._seconds["wall"]
        live = part.video if isinstance(part.video, LiveVideo) else None
        prefetch = live or Prefetch(timed(part.whole_frames(), spent, "decoding"))
        writer: Writer[Written] = Writer(lambda items: self._write(items, overlay, exports))
        bar = Progress(desc=title or "", unit="frame", total=part.frame_count, shown=title is not None)
        taken: deque[np.ndarray] = deque()

        def source() -> Iterator[np.ndarray]:
            for index, frame in enumerate(prefetch):
                if index < done:
                    writer.put((index, frame, None, ()))
                    bar.update()
                else:
                    taken.append(frame)
                yield part.seen(frame)

        # the tracker pulls its frames itself: what it waits for them is not tracking
        results = self.tracker.track(
            timed(source(), spent, "waiting", "tracking"),
            masks,
            part.frame_count,
            resume=saved and saved["tracker"],
            backward=backward,
        )
        self.out.mkdir(parents=True, exist_ok=True)
        for partial in (*self.out.glob(".*.partial.*"), *self.out.glob("masks/.*.partial.*")):
            partial.unlink()
        for line in announce:
            print(line, flush=True)
        try:
            with prefetch, writer, bar:
                for result in timed(results, spent, "tracking"):
                    # only now it is known that all that was given, and the frames passed over, make sense
                    self._clear(done)
                    labels = part.whole(result.labels)
                    self._note(result, labels)
                    writer.put((result.index, taken.popleft(), labels, result.objects))
                    bar.update()
                    if resume_file is not None and resume_file.due():
                        # the state must not name masks that are not written
                        writer.flush()
                        spent["wall"] = time.perf_counter() - started
                        resume_file.write(self._state())
                self._clear(done)
            self.summary["stopped"], self._ended = None, True
        except (BrokenVideo, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
            if not self.summary["frames"] or (isinstance(error, RuntimeError) and not is_out_of_memory(error)):
                raise
            self._ended = isinstance(error, BrokenVideo)
            late = sorted(part.name(part.numbers[index]) for index in masks if index >= self.summary["frames"])
            unused = f"; the masks of frames {late} were not used" if self._ended and late else ""
            self.summary["stopped"] = INTERRUPTED if isinstance(error, KeyboardInterrupt) else one_line(error) + unused
        spent["wall"] = time.perf_counter() - started
        if overlay:
            self.summary["files"]["overlay"] = str(self.out / OVERLAY)
        self.summary["files"] |= exports.files if exports else {}
        if live:
            self.summary["files"]["signals"] = str(self.out / SIGNALS)
            self.summary["live"] = live.summary()
        self._measure()

    def _track_backward(self, part: Part, backward: Backward, file: ResumeFile, title: str | None) -> None:
        """Track backwards, and keep what is found for the pass forwards."""
        self.out.mkdir(parents=True, exist_ok=True)
        saved = file.saved
        done = saved["frames"] if saved else 0
        passed = timed(
            self.tracker.track_backward(part, backward, resume=saved and saved["tracker"]), self._seconds, "tracking"
        )
        total = backward.start + 1
        with Progress(desc=f"{title}, backwards", unit="frame", total=total, initial=done, shown=bool(title)) as bar:
            for count, _ in enumerate(passed, done + 1):
                self._clear(0)
                if saved is None and count == 1:
                    # of an earlier run
                    file.path.unlink(missing_ok=True)
                bar.update()
                if file.due():
                    file.write({"tracker": self.tracker.state(), "frames": count})

    def mask_file(self, index: int) -> Path:
        """Where the mask of a frame of the part is."""
        return self.out / "masks" / self.part.mask_name(index)

    def write_summary(self) -> None:
        """Write summary.json; a run that has seen all of its video needs no state to resume from."""
        write_json(self.out / SUMMARY, self.summary)
        if self._ended:
            (self.out / RESUME_FILE).unlink(missing_ok=True)
            shutil.rmtree(self.out / BACKWARD, ignore_errors=True)

    def _take_up(self, saved: dict[str, Any]) -> int:
        """Be where an earlier run was when it saved this; how many frames it had tracked."""
        done = saved["summary"]["frames"]
        for index in range(done):
            if not self.mask_file(index).is_file():
                raise ValueError(f"{self.mask_file(index)}: is gone, without it the run can't go on")
        self.summary |= saved["summary"]
        self._seconds |= saved["seconds"]
        return done

    def _state(self) -> dict[str, Any]:
        """What `_take_up` needs, and the tracker."""
        summary = {name: self.summary[name] for name in ("frames", "objects", "size", "signals")}
        return {"tracker": self.tracker.state(), "summary": summary, "seconds": dict(self._seconds)}

    def _clear(self, done: int) -> None:
        """Remove, once, what an earlier run wrote, but for its first `done` masks, and nothing else."""
        if self._began:
            return
        self._began = True
        # of an earlier run, which may have been on a folder
        names = set(self._earlier("mask_names"))
        for name in [] if done else self._earlier("settings", "export"):
            FORMATS[name].remove(self.out)
        (self.out / "masks").mkdir(exist_ok=True)
        # says at any time whose results these are, and that a run that is killed is unfinished
        self.write_summary()
        kept = {self.mask_file(index) for index in range(done)}
        found = {file for file in (self.out / "masks").glob("*.png") if file.stem.isdigit() or file.name in names}
        others = [self.out / name for name in (OVERLAY, SHEET, SIGNALS, *([] if done else [RESUME_FILE]))]
        for file in [*(found - kept), *others]:
            file.unlink(missing_ok=True)

    def _earlier(self, *keys: str) -> list[str]:
        """The names that an earlier run noted in its summary."""
        try:
            found = json.loads((self.out / SUMMARY).read_text())
            for key in keys:
                found = found[key]
            return list(found or ())
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def _note(self, result: FrameResult, labels: np.ndarray) -> None:
        """Note the area, certainty, familiarity and trust of each object in a frame, and where it is likely lost."""
        self.summary["size"] = list(labels.shape)
        number = self.part.number(result.index)
        is_live, found = isinstance(self.part.video, LiveVideo), {}
        each = zip(result.objects, result.certainty, result.familiarity, result.trust, strict=True)
        for label, certainty, familiarity, trust in each:
            noted = self.summary["signals"].setdefault(str(label), {"from": number, "uncertain": [], "lost": 0})
            found[str(label)] = signals = {
                "area": round(float((labels == label).mean()), 6),
                "certainty": round(certainty, 4),
                # JSON has no infinity
                "familiarity": round(familiarity, 4) if math.isfinite(familiarity) else None,
                "trust": round(trust, 4),
            }
            if trust < UNTRUSTED:
                noted["lost"] += 1
                if not is_live or len(noted["uncertain"]) < MOST_UNCERTAIN:
                    noted["uncertain"].append(number)
            for name, value in {} if is_live else signals.items():
                noted.setdefault(name, []).append(value)
        if is_live:
            with open(self.out / SIGNALS, "a", encoding="utf-8") as file:
                file.write(json.dumps({"frame": number, "objects": found}) + "\n")

    def _write(
        self,
        items: Iterator[Written],
        overlay: bool,
        exports: Exports | None,
    ) -> None:
        """Write masks, exports and the overlay as they come, each frame at its time in the video; without labels the
        mask is there already.
        """
        with contextlib.ExitStack() as stack:
            part, video, drawing = self.part, None, Overlay(self.overlay_style)
            if overlay:
                file = part.video.path if isinstance(part.video, VideoFile) else None
                writer = VideoWriter(self.out / OVERLAY, part.fps, time_base=part.clip.time_base, sound=file)
                video = stack.enter_context(writer)
            if exports is not None:
                stack.enter_context(exports)
            for index, frame, labels, objects in items:
                started = time.perf_counter()
                if labels is not None:
                    if self.stream is None:
                        write_mask(self.mask_file(index), labels)
                    else:
                        self.stream.write(labels)
                    self.summary["frames"], self.summary["objects"] = index + 1, list(objects)
                elif video is None and exports is None:
                    continue
                else:
                    labels = read_mask(self.mask_file(index))
                if exports is not None:
                    exports.write(part.number(index), labels, frame)
                if video is not None:
                    colored = drawing.draw(frame, labels)
                    video.write(colored, part.clip.time(part.number(index)))
                self._seconds["writing"] += time.perf_counter() - started
            for unfinished in (video, exports):
                if unfinished is not None and not self._began:
                    unfinished.discard()

    def _measure(self) -> None:
        self.summary["seconds"] = dict(self._seconds)
        self.summary["fps"] = self.summary["frames"] / max(self._seconds["tracking"], 1e-9)
        self.summary["peak_memory_bytes"]["process"] = peak_process_memory()
        if torch.device(self.summary["device"]).type == "cuda":
            self.summary["peak_memory_bytes"]["device"] = torch.cuda.max_memory_allocated(self.summary["device"])


def is_output_of(command: str, out: Path) -> bool:
    """Whether a folder is missing, empty, or was written by `command`."""
    if is_empty(out):
        return True
    try:
        return json.loads((out / SUMMARY).read_text())["command"] == command
    except (OSError, ValueError, KeyError, TypeError):
        return False


def plain_settings(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass of settings as JSON has them; paths are absolute."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=lambda path: str(path.resolve())))
