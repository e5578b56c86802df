"""The next frame is encoded in a thread of its own while this one is segmented: a frame's features need no masks."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from stm_model.tracking.frames import Frame

Encoded = TypeVar("Encoded")

_END: Any = object()
"""Follows the last frame."""


def pays(device: torch.device) -> bool:
    """Whether there is a second thread to encode in, and OpenMP's threads sleep while they wait: those that spin take
    its time. A GPU has enough to do with one frame.
    """
    asleep = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    return device.type == "cpu" and torch.get_num_threads() > 1 and asleep


def encoded_ahead(
    frames: Iterable[Frame], encode: Callable[[Frame], Encoded], first: int
) -> Iterator[tuple[Frame, Future[Encoded] | None]]:
    """Frames, each with what `encode` gives of it, if it is `first` or behind it.

    A frame is taken from `frames` and begun to be encoded before the one in front of it is given out. What `frames`
    raises comes in its turn.
    """
    source, worker = iter(frames), _worker(torch.get_num_threads())
    frame, encoded = next(source, _END), None
    for following in itertools.count(1):
        if frame is _END:
            return
        error = None
        try:
            later = next(source, _END)
        except Exception as raised:
            error = raised
        begun = None
        if error is None and later is not _END and following >= first:
            begun = worker.submit(encode, later)
        yield frame, encoded
        if error is not None:
            raise error
        frame, encoded = later, begun


@functools.cache
def _worker(threads: int) -> ThreadPoolExecutor:
    """A thread that computes with half of so many threads."""
    worker = ThreadPoolExecutor(1, "encode")

    def start() -> None:
        # the first question in a thread sets it to what all threads begin with
        torch.get_num_threads()
        torch.set_num_threads(max(1, threads // 2))

    worker.submit(start).result()
    # what a thread sets for itself, threads that are yet to come would begin with
    torch.set_num_threads(threads)
    return worker


# a process that is forked has the worker but not its thread; Windows has no forks
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.cache_clear)
