"""The storage of a paged memory: pages on the device, and pages on the host that stream through it."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

Page = tuple[Tensor, Tensor]
"""Keys `[B, P, C]` and values `[B, P, V]`; P is the page size, or fewer positions in a part of a page."""


class Pages:
    """Preallocated pages of keys and values, filled one after the other.

    Args:
        batch, key_channels, value_channels, page_size, dtype, device: as in `PagedMemory`.
        device_pages: the most pages on the device; further ones are in host memory, pinned for a GPU. None is as many
            as the device can hold.
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
        self._staging: Staging | None = None

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page."""
        return self.batch * self.page_size * sum(self.channels) * self.dtype.itemsize

    def write(self, start: int, key: Tensor, value: Tensor) -> None:
        """Copy P positions to the places from `start` on, into new pages where there are none yet."""
        stop = start + key.shape[1]
        while stop > (len(self.on_device) + len(self.on_host)) * self.page_size:
            self._add_page()
        self.length = max(self.length, stop)
        done = 0
        for parts in self.held(start, stop - start):
            count = parts[0].shape[1]
            for part, new in zip(parts, (key, value)):
                part.copy_(new[:, done : done + count])
            done += count

    def held(self, start: int = 0, count: int | None = None) -> list[Page]:
        """Views of the positions from `start` on, one a page, on the device or the host."""
        stop = self.length if count is None else start + count
        parts = []
        for first in range(start - start % self.page_size, stop, self.page_size):
            index, places = first // self.page_size, slice(max(start - first, 0), min(stop - first, self.page_size))
            devices = len(self.on_device)
            key, value = self.on_device[index] if index < devices else self.on_host[index - devices]
            parts.append((key[:, places], value[:, places]))
        return parts

    def stream(self, first_page: int = 0) -> Iterator[Page]:
        """All positions from a page on, page by page, on the device.

        A page from the host is copied while the caller reads the one before, and overwritten after the next one.
        """
        parts, devices = self.held(), len(self.on_device)
        yield from parts[first_page:devices]
        host = parts[max(first_page, devices) :]
        if host and self.device.type == "cuda":
            self._staging = self._staging or Staging([self.new_page() for _ in range(2)])
            yield from self._staging.stream(host)
        else:
            yield from host

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy the positions at the places `sources` `[K]` to the places `targets` `[K]`, which are none of them."""
        pages, size = [*self.on_device, *self.on_host], self.page_size
        for pair in torch.stack([sources // size, targets // size]).unique(dim=1).T:
            here = (sources // size == pair[0]) & (targets // size == pair[1])
            for old, new in zip(*(pages[index] for index in pair.tolist())):
                moved = old[:, (sources[here] % size).to(old.device)]
                new[:, (targets[here] % size).to(new.device)] = moved.to(new.device)

    def truncate(self, length: int) -> None:
        """Remove the positions from `length` on; their pages stay for later ones."""
        self.length = length

    def free_unused(self) -> None:
        """Free the empty pages, those on the host first."""
        used = -(-self.length // self.page_size)
        del self.on_host[max(0, used - len(self.on_device)) :]
        del self.on_device[used:]
        if not self.on_host:
            self._staging = None

    def move_to_device(self) -> None:
        """Move pages from the host to the device up to `device_pages`, the first ones first."""
        while self.on_host and self.device_pages is not None and len(self.on_device) < self.device_pages:
            page = self.on_host.pop(0)
            if self.device.type != "cpu":
                held, page = page, self.new_page()
                for new, old in zip(page, held):
                    new.copy_(old)
            self.on_device.append(page)
        if not self.on_host:
            self._staging = None

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
                    "host memory, which reads more slowly",
                    stacklevel=4,
                )
        self.on_host.append(self.new_page(device=torch.device("cpu")))

    def new_page(self, positions: int | None = None, device: torch.device | None = None) -> Page:
        """A page of uninitialised memory, of the usual size and on the device unless told otherwise."""
        positions, device = self.page_size if positions is None else positions, device or self.device
        pinned = device.type == "cpu" and self.device.type == "cuda"
        key_channels, value_channels = self.channels
        # a tensor made in inference mode could never be appended to outside it
        with torch.inference_mode(False):
            like = torch.empty(0, dtype=self.dtype, device=device)
            return (
                like.new_empty(self.batch, positions, key_channels, pin_memory=pinned),
                like.new_empty(self.batch, positions, value_channels, pin_memory=pinned),
            )


class Staging:
    """Two pages on a GPU that host pages stream through, on a stream of their own."""

    def __init__(self, buffers: list[Page]) -> None:
        self.buffers = buffers
        self.device = buffers[0][0].device
        self.copies = torch.cuda.Stream(self.device)
        self.filled = [torch.cuda.Event() for _ in buffers]
        self.read = [torch.cuda.Event() for _ in buffers]

    def stream(self, parts: list[Page]) -> Iterator[Page]:
        """The parts of host pages, one after the other, each valid until the next one is asked for."""
        reader = torch.cuda.current_stream(self.device)
        # earlier reads of the buffers must be done
        self.copies.wait_stream(reader)
        staged = [self._copy(0, parts[0])]
        for index in range(len(parts)):
            if index + 1 < len(parts):
                if index:
                    self.copies.wait_event(self.read[(index + 1) % 2])
                staged.append(self._copy((index + 1) % 2, parts[index + 1]))
            reader.wait_event(self.filled[index % 2])
            yield staged[index]
            self.read[index % 2].record(reader)

    def _copy(self, buffer: int, part: Page) -> Page:
        key, value = (held[:, : source.shape[1]] for held, source in zip(self.buffers[buffer], part))
        with torch.cuda.stream(self.copies):
            for target, source in zip((key, value), part):
                target.copy_(source, non_blocking=True)
            self.filled[buffer].record(self.copies)
        return key, value
