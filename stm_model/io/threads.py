"""Bounded prefetch and writer threads."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")

DEPTH = 3
"""Most items that wait in a queue."""


_END: Any = object()
"""Follows the last item."""


class Prefetch(Generic[Item]):
    """Iterates over a source in a thread of its own, at most `DEPTH` items ahead; a context manager, for one pass.

    What the source raises comes out of the iteration, after the items before it.
    """

    def __init__(self, source: Iterable[Item]):
        self._items, self._thread = iter(source), ThreadPoolExecutor(1, "prefetch")
        self._ahead: deque[Future[Item]] = deque()

    def __enter__(self) -> Prefetch[Item]:
        self._ahead.extend(self._next() for _ in range(DEPTH))
        return self

    def __iter__(self) -> Iterator[Item]:
        while (item := self._ahead.popleft().result()) is not _END:
            self._ahead.append(self._next())
            yield item

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        # a source that is left is closed
        del self._items

    def _next(self) -> Future[Item]:
        return self._thread.submit(next, self._items, _END)


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
        self._queue.put(_END)
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
        while (item := self._queue.get()) is not _END:
            yield item
            self._queue.task_done()
