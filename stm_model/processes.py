"""Worker processes that leave it to their parent to end a command by a signal, and end with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import SpawnContext, SpawnProcess

from stm_model.runtime import SIGNALS, keep_freed_memory


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes that are started within the block never get SIGINT, SIGTERM and SIGHUP.

    A terminal, `timeout` and a cluster's scheduler send these to every process of a command, and a worker that one of
    them ends is an error where its parent, which keeps what is done, has not got it yet.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {getattr(signal, name) for name in SIGNALS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Process(SpawnProcess):
    def start(self) -> None:
        with signals_blocked():
            super().start()


class _Context(SpawnContext):
    Process = _Process


@contextlib.contextmanager
def worker_pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes for the time of the block; an error in it ends them at once, a signal reaches this process
    alone.
    """
    # spawned, as a process that has threads must not be forked
    pool = ProcessPoolExecutor(count, _Context(), _begin)
    try:
        yield pool
    except BaseException:
        # they don't get the SIGTERM by which a pool with a dead process ends the others
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """What a worker does first; it ends with its parent, as it would else wait for its next task for ever."""
    keep_freed_memory()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
