"""Live video: cameras, network streams and stdin, whose frames come when they come; which of them are tracked."""

from __future__ import annotations

import os
import queue
import select
import statistics
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from stm_model.io.damage import BrokenVideo
from stm_model.io.images import MediaError, reason, width_by_height
from stm_model.io.threads import DEPTH
from stm_model.io.video import FOLDER_FPS, upright
from stm_model.progress import say
from stm_model.runtime import STDIN

RECONNECTED = ("rtsp", "rtsps", "rtmp", "tcp")
"""Protocols of streams that have no end: where one ends, it is connected again."""
TRIES, PAUSE = 5, 2.0
"""How often a lost stream is connected again, and the seconds before each time."""
STALL = 30.0
"""Seconds without a frame after which a source counts as stalled."""
TIMEOUT = (10.0, 10.0)
"""Seconds for the network to connect, and to bring something."""


class _Arrived(NamedTuple):
    number: int
    frame: np.ndarray
    time: float


class LiveVideo:
    """Frames of a live source, decoded in a thread; iterated over once. A context manager.

    The first frame stays until it is asked for. Of those after it the newest is kept and older unread ones are dropped,
    or, where `every` is true, none: the source waits.

    For the address see `stm_model.runtime.is_live`.

    Raises:
        MediaError: there is no such source, or it brings no frame.
        BrokenVideo: while iterating: it stalls, changes its size, breaks off or ends within a frame.
    """

    files: tuple[Path, ...] = ()
    frame_count = None

    def __init__(self, address: str, every: bool):
        self.path = self.name = "stdin" if address == STDIN else address
        self.address, self.every = address, every
        self.scheme = address.partition("://")[0] if "://" in address else None
        self.fps = FOLDER_FPS
        self.dropped = self.reconnected = self.damaged = 0
        self.arrived = array("q")
        """Number of each frame among all that came, from 0: what was dropped counts."""
        self.latencies = array("d")
        """Seconds from a frame's decoding until the next one was asked for, without the first."""
        self._closed = threading.Event()
        self._error: Exception | None = None
        self._queue: queue.Queue[_Arrived | None] = queue.Queue(DEPTH if every else 1)
        self._thread = threading.Thread(target=self._read, name="live", daemon=True)
        self._thread.start()
        first = self._next(0)
        if first is None:
            raise MediaError(f"{self.path}: brings no video (it ends before its first frame)")
        self._first, self.size = first, first.frame.shape[:2]
        self.time_base = 1 / self.fps

    def __iter__(self) -> Iterator[np.ndarray]:
        arrived: _Arrived | None = self._first
        while arrived is not None:
            if arrived.frame.shape[:2] != self.size:
                sizes = f"{width_by_height(self.size)} to {width_by_height(arrived.frame.shape)}"
                raise BrokenVideo(f"{self.path}: its frames change from {sizes} pixels", len(self.arrived))
            self.arrived.append(arrived.number)
            yield arrived.frame
            if arrived.number:
                self.latencies.append(time.monotonic() - arrived.time)
            arrived = self._next(len(self.arrived))

    def __enter__(self) -> LiveVideo:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading; a camera or stream that brings nothing is not waited for."""
        self._closed.set()
        # it may wait for a free place
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        # a thread within FFmpeg may keep the interpreter from ending
        self._thread.join(2.0)

    def summary(self) -> dict[str, Any]:
        """What became of the frames: numbers of dropped and damaged ones, times reconnected, seconds of latency."""
        return {
            "policy": "every frame" if self.every else "newest frame",
            "dropped": self.dropped,
            "damaged": self.damaged,
            "reconnected": self.reconnected,
            "median_latency": round(statistics.median(self.latencies), 4) if self.latencies else None,
            "fps": float(self.fps),
        }

    def _next(self, count: int) -> _Arrived | None:
        """The next frame; None at the end of the source."""
        try:
            # what the network does not bring in time, FFmpeg says
            arrived = self._queue.get(timeout=None if self.scheme else STALL)
        except queue.Empty:
            raise BrokenVideo(f"{self.path}: no frame for {STALL:g} s", count) from None
        if arrived is None and self._error is not None:
            if not count:
                raise MediaError(f"{self.path}: brings no video ({reason(self._error)})") from self._error
            raise BrokenVideo(f"{self.path}: broke off after {count} frames ({reason(self._error)})", count)
        return arrived

    def _read(self) -> None:
        """The thread: every frame into the queue, connected again where that makes sense."""
        number, tries = 0, 0
        while not self._closed.is_set():
            before = number
            try:
                for frame in self._decoded():
                    self._put(_Arrived(number, frame, time.monotonic()))
                    number += 1
                    if self._closed.is_set():
                        return
                self._error = None
            except Exception as error:
                self._error = error
            # a source that never brought a frame is not waited for
            tries = 1 if number > before else tries + 1
            if self.scheme not in RECONNECTED or not number or tries > TRIES:
                break
            why = "ended" if self._error is None else reason(self._error)
            say(f"stm: warning: {self.path}: {why}; connecting again ({tries} of {TRIES})")
            self.reconnected += 1
            self._closed.wait(PAUSE)
        if self.scheme in RECONNECTED and self._error is None:
            self._error = ConnectionError(f"ended, and {TRIES} times no connection")
        self._queue.put(None)

    def _put(self, arrived: _Arrived) -> None:
        # the first frame is taken at once; it is the one that the mask is of
        while not self.every and arrived.number > 1 and self._queue.full():
            with suppress(queue.Empty):
                self._queue.get_nowait()
                self.dropped += 1
        self._queue.put(arrived)

    def _decoded(self) -> Iterator[np.ndarray]:
        source: Any = self.address
        options: dict[str, str] = {}
        form = None
        if self.address == STDIN:
            source = _Stdin(self._closed)
        elif self.scheme is None:
            form = "v4l2" if sys.platform == "linux" else None
        elif self.scheme in ("rtsp", "rtsps"):
            options = {"rtsp_transport": "tcp"}
        with av.open(source, format=form, options=options, timeout=TIMEOUT if self.scheme else None) as container:
            if not container.streams.video:
                raise ValueError("holds no video stream")
            stream = container.streams.video[0]
            self.fps = Fraction(stream.average_rate or stream.guessed_rate or FOLDER_FPS)
            end = 0
            for packet in container.demux(stream):
                data = bytes(packet) if stream.codec.name == "mjpeg" else b""
                if data and not data.rstrip(b"\0").endswith(b"\xff\xd9"):
                    if isinstance(source, _Stdin) and source.ended:
                        raise EOFError("ends within a frame")
                    self.damaged += 1
                    continue
                try:
                    yield from map(upright, packet.decode())
                except av.error.InvalidDataError:
                    self.damaged += 1
                end = (packet.pos or 0) + packet.size if packet.size else end
            if container.format.name == "yuv4mpegpipe" and self.address == STDIN and source.count > end:
                raise EOFError("ends within a frame")


class _Stdin:
    """stdin as FFmpeg reads it: what is there, without waiting for more; how many bytes that were, and its end, which
    `closed` brings about.
    """

    def __init__(self, closed: threading.Event) -> None:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("expected video (y4m, mjpeg, …) on stdin, got a terminal")
        self._file = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
        self.count, self.ended, self._closed = 0, False, closed

    def read(self, size: int) -> bytes:
        # Windows selects sockets only
        while os.name == "posix" and not self._closed.is_set():
            if select.select([self._file], [], [], 0.2)[0]:
                break
        part = b"" if self._closed.is_set() else self._file.read(size)
        self.count += len(part)
        self.ended = not part
        return part
