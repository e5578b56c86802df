"""Host pages that stream through two buffers on a GPU, with streams and events simulated: no device is needed."""

from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from stm_kernels.memory import pages
from stm_kernels.memory.pages import Staging


class Event:
    """A mark in the queue of the stream that recorded it last."""

    stream = None

    def record(self, stream: "Stream") -> None:
        self.stream, self.mark = stream, stream.enqueued


class Stream:
    """Work that is done at once, or as late as the events allow: both are what a GPU may do."""

    def __init__(self, eager: bool) -> None:
        self.eager, self.queue, self.enqueued, self.done = eager, [], 0, 0

    def enqueue(self, work: Callable[[], object]) -> None:
        self.queue.append(work)
        self.enqueued += 1
        if self.eager:
            self.run(self.enqueued)

    def run(self, mark: int) -> None:
        while self.done < mark:
            self.done += 1
            self.queue.pop(0)()

    def wait_event(self, event: Event) -> None:
        # an event that was never recorded is waited for by nobody
        if (stream := event.stream) is not None:
            mark = event.mark
            self.enqueue(lambda: stream.run(mark))

    def wait_stream(self, stream: "Stream") -> None:
        mark = stream.enqueued
        self.enqueue(lambda: stream.run(mark))


class Buffer:
    """A tensor on the device: what is copied into it is copied by the current stream, in its turn."""

    def __init__(self, tensor: torch.Tensor, current: list[Stream]) -> None:
        self.tensor, self.current, self.device = tensor, current, tensor.device

    def __getitem__(self, index) -> "Buffer":
        return Buffer(self.tensor[index], self.current)

    def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self.current[-1].enqueue(lambda: self.tensor.copy_(source))


@pytest.fixture(params=["copies first", "reads first", "both late"])
def simulated(request, monkeypatch) -> SimpleNamespace:
    """A staging whose copies are eager or late, and the stream that reads."""
    reader, copies = Stream(request.param == "reads first"), Stream(request.param == "copies first")
    current = [reader]

    @contextmanager
    def on_stream(stream: Stream):
        current.append(stream)
        yield
        current.pop()

    cuda = SimpleNamespace(
        Stream=lambda device: copies, Event=Event, stream=on_stream, current_stream=lambda device: reader
    )
    monkeypatch.setattr(pages, "torch", SimpleNamespace(cuda=cuda))
    buffers = [tuple(Buffer(torch.empty(2, 8, channels), current) for channels in (3, 5)) for _ in range(2)]
    return SimpleNamespace(staging=Staging(buffers), reader=reader)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_every_page_is_read_as_it_is(simulated, count):
    sizes = [8] * (count - 1) + [5]
    parts = [tuple(torch.randn(2, size, channels) for channels in (3, 5)) for size in sizes]
    read = []

    def note(key: Buffer, value: Buffer) -> None:
        read.append((key.tensor.clone(), value.tensor.clone()))

    # twice: a second read takes the buffers of the first
    for _ in range(2):
        for key, value in simulated.staging.stream(parts):
            simulated.reader.enqueue(lambda key=key, value=value: note(key, value))
    simulated.reader.run(simulated.reader.enqueued)
    assert len(read) == 2 * count
    for found, expected in zip(read, parts * 2, strict=True):
        assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
