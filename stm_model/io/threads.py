"""Work beside other work: a thread fetches items before they are used, another uses up results; few wait at a time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

HELD = 3
"""Most items that wait for their turn, in either direction."""


class _Ended:
    """Stands in a queue behind its last item, with what the source raised, if it did."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


class Ahead(Generic[Item]):
    """Iterates over a source in a thread of its own, at most `HELD` items ahead; a context manager, for one pass.

    What the source raises comes out of the iteration, after the items before it.
    """

    def __init__(self, source: Iterable[Item]):
        self.busy = 0.0
        """Seconds the source took for its items."""
        self._queue: queue.Queue = queue.Queue(HELD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fetch, args=(source,), name="ahead", daemon=True)

    def __enter__(self) -> Ahead[Item]:
        self._thread.start()
        return self

    def __iter__(self) -> Iterator[Item]:
        while True:
            item = self._queue.get()
            if isinstance(item, _Ended):
                if item.error is not None:
                    raise item.error
                return
            yield item

    def __exit__(self, *_) -> None:
        self._closed.set()
        # whoever waits for room finds some, sees that it is over and ends
        while not self._queue.empty():
            self._queue.get()
        self._thread.join()

    def _fetch(self, source: Iterable[Item]) -> None:
        ended = _Ended()
        try:
            started = time.perf_counter()
            for item in source:
                self.busy += time.perf_counter() - started
                self._queue.put(item)
                if self._closed.is_set():
                    return
                started = time.perf_counter()
        except BaseException as error:
            ended = _Ended(error)
        self._queue.put(ended)


class Behind(Generic[Item]):
    """Hands items to `work` in a thread of its own, in order, at most `HELD` behind; a context manager.

    The block ends when all items are used up, also when it ends by an exception. What `work` raises comes out of the
    next `put`, or of the end of the block; the items after it are let go.

    Args:
        work: is called once, with an iterator over the items.
    """

    def __init__(self, work: Callable[[Iterator[Item]], None]):
        self.busy = 0.0
        """Seconds the work took, without those in which it waited for an item."""
        self._since = 0.0
        self._error: BaseException | None = None
        self._queue: queue.Queue = queue.Queue(HELD)
        self._thread = threading.Thread(target=self._use, args=(work,), name="behind", daemon=True)

    def __enter__(self) -> Behind[Item]:
        self._thread.start()
        return self

    def put(self, item: Item) -> None:
        """Queue an item; waits while `HELD` others do."""
        if self._error is not None:
            raise self._error
        self._queue.put(item)

    def settle(self) -> None:
        """Wait until all items put are used up; raises what `work` raised."""
        self._queue.join()
        if self._error is not None:
            raise self._error

    def __exit__(self, kind, *_) -> None:
        try:
            self._end()
        except KeyboardInterrupt:
            # what is queued is used up all the same; who interrupts once more does not wait for it
            self._end()
            raise
        if kind is None and self._error is not None:
            raise self._error

    def _end(self) -> None:
        self._queue.put(_Ended())
        self._thread.join()

    def _use(self, work: Callable[[Iterator[Item]], None]) -> None:
        items = self._items()
        self._since = time.perf_counter()
        try:
            work(items)
        except BaseException as error:
            self._error = error
            # nobody must wait for room in a queue that is no longer used up
            for _ in items:
                pass
        self.busy += time.perf_counter() - self._since

    def _items(self) -> Iterator[Item]:
        while True:
            self.busy += time.perf_counter() - self._since
            item = self._queue.get()
            self._since = time.perf_counter()
            if isinstance(item, _Ended):
                return
            yield item
            self._queue.task_done()
