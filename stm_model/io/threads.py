"""Bounded prefetch and writer threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

DEPTH = 3
"""Most items that wait in a queue."""


class _End:
    """Follows the last item in a queue, with what the source raised, if it did."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


class Prefetch(Generic[Item]):
    """Iterates over a source in a thread of its own, at most `DEPTH` items ahead; a context manager, for one pass.

    What the source raises comes out of the iteration, after the items before it.
    """

    def __init__(self, source: Iterable[Item]):
        self._queue: queue.Queue = queue.Queue(DEPTH)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fetch, args=(source,), name="prefetch", daemon=True)

    def __enter__(self) -> Prefetch[Item]:
        self._thread.start()
        return self

    def __iter__(self) -> Iterator[Item]:
        while not isinstance(item := self._queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        # a thread that waits for a free place finds one, sees that it is closed, and ends
        while not self._queue.empty():
            self._queue.get()
        self._thread.join()

    def _fetch(self, source: Iterable[Item]) -> None:
        end = _End()
        try:
            for item in source:
                self._queue.put(item)
                if self._closed.is_set():
                    return
        except BaseException as error:
            end = _End(error)
        self._queue.put(end)


class Writer(Generic[Item]):
    """Hands items to `work`, an iterator over them, in a thread, in order, at most `DEPTH` behind; a context manager.

    The block ends when all items are worked on, also when it ends by an exception. What `work` raises comes out of the
    next `put`, or of the end of the block; the items after it are dropped.
    """

    def __init__(self, work: Callable[[Iterator[Item]], None]):
        self._error: BaseException | None = None
        self._queue: queue.Queue = queue.Queue(DEPTH)
        self._thread = threading.Thread(target=self._run, args=(work,), name="writer", daemon=True)

    def __enter__(self) -> Writer[Item]:
        self._thread.start()
        return self

    def put(self, item: Item) -> None:
        """Queue an item; waits while `DEPTH` others do."""
        if self._error is not None:
            raise self._error
        self._queue.put(item)

    def flush(self) -> None:
        """Wait until all items put are worked on; raises what `work` raised."""
        self._queue.join()
        if self._error is not None:
            raise self._error

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._end()
        except KeyboardInterrupt:
            # what is queued is worked on all the same; a second interrupt does not wait for it
            self._end()
            raise
        if kind is None and self._error is not None:
            raise self._error

    def _end(self) -> None:
        self._queue.put(_End())
        self._thread.join()

    def _run(self, work: Callable[[Iterator[Item]], None]) -> None:
        items = self._items()
        try:
            work(items)
        except BaseException as error:
            self._error = error
            # `put` must not wait for a queue that nobody empties
            for _ in items:
                pass

    def _items(self) -> Iterator[Item]:
        while not isinstance(item := self._queue.get(), _End):
            yield item
            self._queue.task_done()
