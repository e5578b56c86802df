"""Behind the page: one session, the tab that owns it, work in the background, uploads and downloads."""

import os
import re
import shutil
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stm_model.interactive.footage import Footage
from stm_model.interactive.results import check_results, write_results
from stm_model.interactive.scribbles import MAX_LABEL
from stm_model.interactive.session import Direction, Progress, ScribbleSession
from stm_model.interactive.state import UNCERTAIN
from stm_model.io.formats.given import open_drawn
from stm_model.io.images import draw_line, encode_jpeg, fill_polygons, overlay
from stm_model.io.masks import read_masks
from stm_model.network import STM


class Refused(ValueError):
    """A request that cannot be done now; the message says why, and what can."""


class TakenElsewhere(Refused):
    """Another tab owns the session."""


class _Stopped(Exception):
    pass


@dataclass
class Job:
    """Work in the background."""

    name: str
    done: int = 0  # frames
    total: int = 0  # frames; 0 until it is known
    left: float | None = None  # seconds; None until a frame is done
    error: str | None = None  # why it failed
    running: bool = True
    stopping: bool = False  # asked to stop
    _begun: float = field(default_factory=time.monotonic)

    def progress(self, done: int, total: int) -> None:
        """Note the progress, and stop here if asked to."""
        self.done, self.total = done, total
        # from the start on: frames that are computed together come at once
        self.left = (time.monotonic() - self._begun) / done * (total - done)
        if self.stopping:
            raise _Stopped

    def run(self, work: Callable[[Progress], None]) -> None:
        """Do the work; what goes wrong becomes `error`, as nobody else sees what a thread raises."""
        try:
            work(self.progress)
        except _Stopped:
            self.error = f"{self.name} was stopped"
        except Exception as error:
            self.error = f"{self.name} failed: {str(error).partition(chr(10))[0] or type(error).__name__}"
            if not isinstance(error, (ValueError, OSError, MemoryError)):
                traceback.print_exc()

    def shown(self) -> dict[str, Any]:
        """What the page is told."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class Workbench:
    """A session for one browser tab at a time; longer videos and larger uploads than the limits are refused."""

    def __init__(
        self,
        footage: Footage,
        make_session: Callable[[Footage], ScribbleSession],
        load_tracking_model: Callable[[], STM],
        *,
        most_frames: int,
        upload_bytes: int,
    ):
        self._make_session, self._load_tracking_model = make_session, load_tracking_model
        self.most_frames, self.upload_bytes = most_frames, upload_bytes
        self._opened = footage, make_session(footage)
        self._lock = threading.RLock()
        self._owner: str | None = None
        self.job: Job | None = None
        self._threads: list[threading.Thread] = []
        self.files: dict[str, Path] = {}
        """Exported files by name."""
        self._folder = tempfile.TemporaryDirectory(prefix="stm-interact-")
        # differs from run to run: a browser may still cache pictures of another one
        self._nonce, self._version = uuid.uuid4().hex[:8], 0

    def start_warm_up(self) -> None:
        """`warm_up` in the background."""
        self._threads.append(threading.Thread(target=self.warm_up, daemon=True))
        self._threads[-1].start()

    def warm_up(self) -> None:
        """Compute and drop a preview: the first one of a process takes longer than the others."""
        session = self._make_session(self.footage)
        session.add_scribbles(0, [{"path": [[0.5, 0.5]], "object_id": 1}])
        session.preview(0)

    def close(self) -> None:
        """Stop the work, wait for its end and remove the files."""
        if self.job is not None:
            self.job.stopping = True
        # a process that ends under a thread that computes aborts
        for thread in self._threads:
            thread.join()
        self._folder.cleanup()

    @property
    def footage(self) -> Footage:
        """The present video."""
        return self._opened[0]

    @property
    def session(self) -> ScribbleSession:
        """Its session."""
        return self._opened[1]

    def enter(self, tab: str, take: bool = False) -> None:
        """Make a tab the owner, if there is none or it takes over."""
        with self._lock:
            if self._owner is None or take:
                self._owner = tab

    def leave(self, tab: str) -> None:
        """A tab was closed."""
        with self._lock:
            if self._owner == tab:
                self._owner = None

    def status(self, tab: str | None) -> dict[str, Any]:
        """All that the page shows except pictures."""
        with self._lock:
            (footage, session), job = self._opened, self.job
            steps, position = session.steps
            return {
                "yours": self._owner == tab,
                "video": {
                    "name": footage.name,
                    "frames": len(footage.frames),
                    "height": footage.size[0],
                    "width": footage.size[1],
                    "fps": float(footage.fps),
                    "damage": footage.damage,
                },
                "objects": list(session.objects),
                "names": session.names,
                "colors": [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in session.palette[: MAX_LABEL + 1]],
                "annotated": list(session.annotated_frames),
                "rounds": session.rounds,
                "steps": list(steps),
                "position": position,
                "scribbles": {str(frame): list(drawn) for frame, drawn in session.state.scribbles.items()},
                "version": f"{self._nonce}.{self._version}",
                "job": None if job is None else job.shown(),
                "files": sorted(self.files),
            }

    def picture(self, index: int, masks: bool) -> bytes:
        """A frame as JPEG, with or without its masks."""
        footage, session = self._opened
        labels = session.labels(index)
        frame = np.asarray(footage.frames[index])
        return encode_jpeg(overlay(frame, labels, colors=session.palette) if masks else frame)

    def certainty(self) -> dict[str, Any]:
        """How sure each frame's masks are, None where there are none; `below` what a frame is worth a look."""
        version, session = self._version, self._opened[1]
        return {"version": f"{self._nonce}.{version}", "frames": session.certainty, "below": UNCERTAIN}

    def preview(self, tab: str, index: int) -> bytes:
        """A frame as JPEG with the masks that a round would give it."""
        with self._editing(tab, changes=False) as session:
            frame, labels = np.asarray(session.frames[index]), session.preview(index)
            return encode_jpeg(overlay(frame, labels, colors=session.palette))

    def scribble(self, tab: str, index: int, label: int, path: list[list[float]]) -> None:
        """Draw a stroke."""
        with self._editing(tab) as session:
            self._check_label(session, label, background=True)
            session.add_scribbles(index, [{"path": path, "object_id": label}])

    def paint(self, tab: str, index: int, label: int, path: list[list[float]], brush: int, erase: bool = False) -> None:
        """Add what a brush of so many pixels covers to an object's mask on a frame, or erase it; 0 is the area inside
        the path.
        """
        with self._editing(tab) as session:
            self._check_label(session, label, background=False)
            points = np.asarray(path, dtype=float)
            least = 1 if brush else 3
            if points.ndim != 2 or points.shape[1:] != (2,) or len(points) < least:
                raise Refused(f"path: expected at least {least} points [x, y]")
            if not ((points >= 0) & (points <= 1)).all():
                raise Refused("path: a point is outside the frame; expected values from 0 to 1")
            height, width = session.frame_size
            if not 0 <= brush <= max(height, width):
                raise Refused(f"brush: expected 0 to {max(height, width)} pixels, got {brush}")
            points *= (width - 1, height - 1)
            if brush:
                area = draw_line((height, width), points.tolist(), brush)
            else:
                area = fill_polygons((height, width), [points.ravel().tolist()])
            mask = session.labels(index) == label
            session.paint(index, mask & ~area if erase else mask | area, label)

    def describe(self, tab: str, label: int, name: str, color: str) -> None:
        """Give an object a name and a color."""
        with self._editing(tab) as session:
            session.describe(label, name.strip(), color.lower())

    def remove(self, tab: str, label: int) -> None:
        """Delete an object."""
        with self._editing(tab) as session:
            session.remove(label)

    def undo(self, tab: str) -> None:
        """Undo the last step."""
        with self._editing(tab) as session:
            session.undo()

    def redo(self, tab: str) -> None:
        """Redo the last step undone."""
        with self._editing(tab) as session:
            session.redo()

    def run(self, tab: str) -> None:
        """Start a round."""
        with self._editing(tab, changes=False) as session:
            if not session.objects:
                raise Refused("no object yet: draw a scribble on one first")
            self._start(f"round {session.rounds + 1}", session.run)

    def track(self, tab: str, index: int, direction: Direction) -> None:
        """Start tracking from a frame."""
        with self._editing(tab, changes=False) as session:
            if not session.labels(index).any():
                raise Refused(f"frame {index} has no mask to track from")
            self._start(
                f"tracking from frame {index}",
                lambda progress: session.track_from(index, self._load_tracking_model(), direction, progress),
            )

    def export(self, tab: str, formats: list[str]) -> None:
        """Start writing the masks in formats of `stm convert`, or as `overlay`."""
        footage = self.footage

        def work(progress: Progress) -> None:
            folder = Path(self._folder.name, "results")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            self.files = {path.name: path for path in write_results(session, footage, formats, folder, progress)}

        with self._editing(tab, changes=False) as session:
            check_results(formats)
            self.files = {}
            self._start("export", work)

    def stop(self, tab: str) -> None:
        """Ask the work in the background to stop, which leaves the session unchanged."""
        with self._lock:
            self._check_owner(tab)
            if self.job is not None:
                self.job.stopping = True

    def saved_session(self) -> Path:
        """The session as a file."""
        path = Path(self._folder.name) / "session.stm"
        with self._lock:
            self.session.save(path)
        return path

    @contextmanager
    def upload(self, name: str) -> Iterator[Path]:
        """Path for an uploaded file, removed when the block ends."""
        path = Path(self._folder.name) / f"upload-{uuid.uuid4().hex}{Path(safe_name(name)).suffix}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def restore(self, tab: str, path: Path, name: str) -> None:
        """Continue from a saved session of this video."""
        with self._editing(tab) as session, _named(path, name):
            session.restore(path)

    def give(self, tab: str, path: Path, name: str, index: int, label: int) -> None:
        """Take masks from a file: a picture is of frame `index`, and with a `label` but 0 of this object alone."""
        with self._editing(tab) as session, _named(path, name):
            if label:
                self._check_label(session, label, background=False)
            if drawn := open_drawn(path, self.footage.source):
                session.give(drawn, drawn.names)
            else:
                (labels,) = read_masks(path, binary=label > 0).values()
                session.give({index: labels * np.uint8(label or 1)})

    def open(self, tab: str, path: Path, name: str) -> None:
        """Start over with another video."""
        with self._editing(tab), _named(path, name):
            footage = Footage(path, self.most_frames, Path(safe_name(name)).stem)
            self._opened = footage, self._make_session(footage)
            self.files, self.job = {}, None

    @contextmanager
    def _editing(self, tab: str, changes: bool = True) -> Iterator[ScribbleSession]:
        with self._lock:
            self._check_owner(tab)
            if self.job is not None and self.job.running:
                raise Refused(f"{self.job.name} is running; wait, or stop it")
            yield self.session
            self._version += changes
            if changes:
                self.files = {}

    def _check_owner(self, tab: str) -> None:
        if self._owner != tab:
            raise TakenElsewhere("this session is open in another tab; take it over to go on here")

    @staticmethod
    def _check_label(session: ScribbleSession, label: int, background: bool) -> None:
        new = max(session.objects, default=0) + 1
        known = ([0] if background else []) + sorted(session.objects)
        if label not in (*known, new):
            listed = f"one of {', '.join(map(str, known))}, or " if known else ""
            raise Refused(f"object {label} is unknown; expected {listed}{new} for a new one")

    def _start(self, name: str, work: Callable[[Progress], None]) -> None:
        self.job = Job(name)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=self._work, args=(self.job, work), daemon=True))
        self._threads[-1].start()

    def _work(self, job: Job, work: Callable[[Progress], None]) -> None:
        job.run(work)
        with self._lock:
            self._version += 1
            job.running = False


@contextmanager
def _named(path: Path, name: str) -> Iterator[None]:
    """Errors about an uploaded file name it as the user does."""
    try:
        yield
    except ValueError as error:
        said = str(error).replace(str(path), safe_name(name)).replace("--binary", '"mask of this object"')
        raise Refused(re.sub(r",( or)? --colors[^)]*", "", said)) from error


def safe_name(name: str | os.PathLike) -> str:
    """A file's name without folders, of letters, digits, dots, dashes and underscores alone."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", re.split(r"[/\\]", str(name))[-1]).strip("._")
    return plain[:80] or "video"
