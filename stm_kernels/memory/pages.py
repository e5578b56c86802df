"""Where the positions of a paged memory lie: pages on the device, and pages on the host that stream through it."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Page = tuple[Tensor, Tensor]
"""Keys `[B, page_size, C]` and values `[B, page_size, V]`."""


class Pages:
    """Preallocated pages of keys and values, filled one after the other.

    Args:
        batch, key_channels, value_channels, page_size, dtype, device: as in `PagedMemory`.
        device_pages: how many pages may lie on the device; further ones lie in the host's memory, pinned for a GPU.
            None is as many as it can hold.
    """

    def __init__(
        self,
        batch: int,
        key_channels: int,
        value_channels: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        device_pages: int | None,
    ) -> None:
        self.batch, self.channels, self.dtype = batch, (key_channels, value_channels), dtype
        self.page_size, self.device, self.device_pages = page_size, device, device_pages
        self.on_device: list[Page] = []
        self.on_host: list[Page] = []
        self.length = 0
        self._staging: _Staging | None = None

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page."""
        return self.batch * self.page_size * sum(self.channels) * self.dtype.itemsize

    def write(self, start: int, key: Tensor, value: Tensor) -> None:
        """Copy P positions to the places from `start` on, into new pages where there are none yet."""
        done, total = 0, key.shape[1]
        while done < total:
            page, place = divmod(start + done, self.page_size)
            while page >= len(self.on_device) + len(self.on_host):
                self._add_page()
            count = min(total - done, self.page_size - place)
            for held, new in zip(self._page(page), (key, value)):
                held[:, place : place + count] = new[:, done : done + count]
            done += count
        self.length = max(self.length, start + total)

    def read_back(self, start: int, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The positions from `start` on, page by page: where each part begins, its keys and its values."""
        while count:
            page, place = divmod(start, self.page_size)
            part = min(count, self.page_size - place)
            key, value = (held[:, place : place + part] for held in self._page(page))
            yield start, key, value
            start, count = start + part, count - part

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on; their pages stay for the next ones."""
        self.length = length

    def free_unused(self) -> None:
        """Give back the pages that hold nothing, those on the host first."""
        used = -(-self.length // self.page_size)
        del self.on_host[max(0, used - len(self.on_device)) :]
        del self.on_device[used:]
        if not self.on_host:
            self._staging = None

    def move_to_device(self) -> None:
        """Bring pages from the host to the device while more may lie there, the first ones first."""
        while self.on_host and self.device_pages is not None and len(self.on_device) < self.device_pages:
            page = self.on_host.pop(0)
            if self.device.type != "cpu":
                held, page = page, self.new_page()
                for new, old in zip(page, held):
                    new.copy_(old)
            self.on_device.append(page)
        if not self.on_host:
            self._staging = None

    def parts(self) -> "Parts":
        """The filled part of every page in use."""
        parts = []
        for index in range(-(-self.length // self.page_size)):
            count = min(self.page_size, self.length - index * self.page_size)
            parts.append(tuple(held[:, :count] for held in self._page(index)))
        if parts and len(parts) > len(self.on_device) and self.device.type == "cuda" and self._staging is None:
            self._staging = _Staging([self.new_page() for _ in range(2)])
        return Parts(parts[: len(self.on_device)], parts[len(self.on_device) :], self._staging)

    def filled(self) -> list[Page]:
        """The filled part of every page in use as it is held; a page that is not full is copied."""
        pages = []
        for start in range(0, self.length, self.page_size):
            held, count = self._page(start // self.page_size), self.length - start
            # whoever writes a view writes all that it is a view of
            pages.append(held if count >= self.page_size else tuple(tensor[:, :count].clone() for tensor in held))
        return pages

    def _page(self, index: int) -> Page:
        devices = len(self.on_device)
        return self.on_device[index] if index < devices else self.on_host[index - devices]

    def _add_page(self) -> None:
        if not self.on_host and (self.device_pages is None or len(self.on_device) < self.device_pages):
            try:
                self.on_device.append(self.new_page())
                return
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if "out of memory" not in str(error) or self.device.type == "cpu":
                    raise
                held = len(self.on_device) * self.page_nbytes / 2**20
                warnings.warn(
                    f"the device is out of memory with {held:.0f} MiB of remembered frames on it: further ones go to "
                    "the host's memory, which reads more slowly",
                    stacklevel=4,
                )
        self.on_host.append(self.new_page(device=torch.device("cpu")))

    def new_page(self, positions: int | None = None, device: torch.device | None = None) -> Page:
        """A page of uninitialised memory, of the usual size and on the device unless told otherwise."""
        positions, device = self.page_size if positions is None else positions, device or self.device
        pinned = device.type == "cpu" and self.device.type == "cuda"
        # a tensor made in inference mode could never be appended to outside it
        with torch.inference_mode(False):
            return tuple(
                torch.empty(self.batch, positions, channels, dtype=self.dtype, device=device, pin_memory=pinned)
                for channels in self.channels
            )


@dataclass(frozen=True)
class Parts:
    """The pages of a memory, to be read one after the other, as often as needed.

    A page from the host is copied to the device while the caller reads the one before, and lent until the next one is
    asked for.
    """

    on_device: list[Page]
    """Pages on the device; without staging the host's memory is the device's."""
    on_host: list[Page]
    """Pages in the host's memory."""
    staging: "_Staging | None" = None
    """What brings these to the device."""

    def __len__(self) -> int:
        return len(self.on_device) + len(self.on_host)

    def __iter__(self) -> Iterator[Page]:
        yield from self.on_device
        yield from self.streamed()

    def streamed(self) -> Iterator[Page]:
        """The pages from the host alone."""
        yield from self.on_host if self.staging is None else self.staging.stream(self.on_host)


class _Staging:
    """Two pages on a GPU that host pages stream through, on a stream of their own."""

    def __init__(self, buffers: list[Page]) -> None:
        self.buffers = buffers
        self.device = buffers[0][0].device
        self.copies = torch.cuda.Stream(self.device)
        self.filled = [torch.cuda.Event() for _ in buffers]
        self.read = [torch.cuda.Event() for _ in buffers]

    def stream(self, parts: list[Page]) -> Iterator[Page]:
        reader = torch.cuda.current_stream(self.device)
        # what read the buffers last must be done with them
        self.copies.wait_stream(reader)
        staged = [self._copy(0, parts[0])] if parts else []
        for index in range(len(parts)):
            if index + 1 < len(parts):
                if index:
                    self.copies.wait_event(self.read[(index + 1) % 2])
                staged.append(self._copy((index + 1) % 2, parts[index + 1]))
            reader.wait_event(self.filled[index % 2])
            yield staged[index]
            self.read[index % 2].record(reader)

    def _copy(self, buffer: int, part: Page) -> Page:
        with torch.cuda.stream(self.copies):
            target = tuple(held[:, : source.shape[1]] for held, source in zip(self.buffers[buffer], part))
            for held, source in zip(target, part):
                held.copy_(source, non_blocking=True)
            self.filled[buffer].record(self.copies)
        return target
