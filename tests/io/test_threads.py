"""Fetching ahead and finishing behind: order, what is held, and how errors come out of the threads."""

import threading
import time

import pytest

from stm_model.io.threads import DEPTH, Prefetch, Writer


def is_fetching():
    return any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_items_come_in_order_and_few_are_held():
    fetched = []

    def source():
        for item in range(20):
            fetched.append(item)
            yield item

    with Prefetch(source()) as items:
        for count, item in enumerate(items):
            assert item == count
            time.sleep(0.01)  # long enough for a source without a bound to run to its end
            # those in the queue, the one in use and the one that waits for room
            assert len(fetched) <= count + DEPTH + 2
    assert fetched == list(range(20)) and not is_fetching()


def test_what_a_source_raises_comes_after_its_items():
    def source():
        yield from "ab"
        raise ValueError("broken")

    seen = []
    with pytest.raises(ValueError, match="broken"), Prefetch(source()) as items:
        for item in items:
            seen.append(item)
    assert seen == ["a", "b"] and not is_fetching()


def test_a_source_that_is_left_is_closed():
    closed = threading.Event()

    def source():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    with Prefetch(source()) as items:
        next(iter(items))
    assert closed.is_set() and not is_fetching()


def test_the_source_runs_while_its_items_are_used():
    second = threading.Event()

    def source():
        yield 1
        second.set()
        yield 2

    with Prefetch(source()) as items:
        assert is_fetching()
        next(iter(items))
        assert second.wait(30), "the source goes on only when it is asked"


def test_all_that_was_put_is_used_up_even_after_an_error():
    used = []
    with pytest.raises(KeyboardInterrupt), Writer(used.extend) as writer:
        for item in range(50):
            writer.put(item)
        raise KeyboardInterrupt
    assert used == list(range(50)) and not writer._thread.is_alive()


def test_few_wait_to_be_used_up():
    used = []

    def slowly(items):
        for item in items:
            time.sleep(0.005)
            used.append(item)

    with Writer(slowly) as writer:
        for item in range(20):
            writer.put(item)
            # those in the queue and the one in use
            assert item - len(used) <= DEPTH + 1
    assert used == list(range(20))


def test_all_that_was_put_is_used_up_when_it_settles():
    used = []

    def slowly(items):
        for item in items:
            time.sleep(0.005)
            used.append(item)

    with Writer(slowly) as writer:
        for count in (1, 3, 0, 9):
            for item in range(count):
                writer.put(item)
            writer.flush()
            assert len(used) == (1, 4, 4, 13)[(1, 3, 0, 9).index(count)]


def test_what_the_work_raises_comes_out_when_it_settles():
    def work(items):
        next(items)
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Writer(work) as writer:
        writer.put(1)
        with pytest.raises(OSError, match="full"):
            writer.flush()


@pytest.mark.parametrize("put", [1, 50])
def test_what_the_work_raises_ends_the_block(put):
    def work(items):
        next(items)
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Writer(work) as writer:
        for item in range(put):
            writer.put(item)
    assert not writer._thread.is_alive()


def test_an_interrupted_end_still_uses_up_what_was_put(monkeypatch):
    used, join, interrupts = [], threading.Thread.join, [KeyboardInterrupt]

    def interrupted(thread, *arguments):
        if interrupts:
            raise interrupts.pop()
        join(thread, *arguments)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt), Writer(used.extend) as writer:
        writer.put(1)
    assert used == [1] and not interrupts
