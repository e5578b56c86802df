"""A memory that grows by pages: appending copies the new positions and nothing else."""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from stm_kernels.affinity import PAGE_MULTIPLE, Affinity
from stm_kernels.memory.page_reads import read_top_k, read_with_usage, usage_comes_with_read, usage_of_pages
from stm_kernels.memory.pages import Pages
from stm_kernels.merge import ReadResult, merge_results
from stm_kernels.operator import autocast_inputs, flat, resolve_implementation, shift_back
from stm_kernels.options import ReadOptions, check_local, check_rows
from stm_kernels.read import checked_inputs, read_checked

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from stm_kernels.options import PageKeywords


class PagedMemory:
    """Keys and values of a growing memory, in preallocated token-major pages.

    For inference: keys and values carry no gradients; a read is differentiable by its query.

    Args:
        batch: B, objects.
        key_channels: C.
        value_channels: V.
        page_size: positions per page.
        device_pages: the most pages on the device; the others are in host memory (pinned for a GPU) and stream through
            two pages on the device while they are read. None is as many as the device can hold.
        dtype: floating-point type of keys and values.
        device: where the memory is read.

    Raises:
        ValueError: a size is not positive.
        TypeError: `dtype` is not a floating-point type.
    """

    def __init__(
        self,
        batch: int,
        key_channels: int,
        value_channels: int,
        *,
        page_size: int = 32768,
        device_pages: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = {"batch": batch, "key_channels": key_channels, "value_channels": value_channels, "page_size": page_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if device_pages is not None and device_pages < 0:
            raise ValueError(f"device_pages: expected at least 0, got {device_pages}")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point type, got {dtype}")
        self.batch, self.key_channels, self.value_channels = batch, key_channels, value_channels
        self.page_size, self.dtype, self.device = page_size, dtype, torch.empty(0, device=device).device
        self._pages = Pages(batch, key_channels, value_channels, page_size, dtype, self.device, device_pages)
        # of the pages on the device, keys above values; the table is the same on the device
        self._addresses: list[list[int]] = []
        self._table = torch.empty(0)

    def __len__(self) -> int:
        """Positions held."""
        return self._pages.length

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, full or not."""
        return self.device_nbytes + self.host_nbytes

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page."""
        return self._pages.page_nbytes

    @property
    def device_pages(self) -> int | None:
        """The most pages on the device. Raising it moves pages there from the host; lowering it moves none."""
        return self._pages.device_pages

    @device_pages.setter
    def device_pages(self, count: int | None) -> None:
        self._pages.device_pages = count
        self._pages.move_to_device()

    @property
    def device_nbytes(self) -> int:
        """Bytes of the pages on the device."""
        return len(self._pages.on_device) * self._pages.page_nbytes

    @property
    def host_nbytes(self) -> int:
        """Bytes of the pages in host memory."""
        return len(self._pages.on_host) * self._pages.page_nbytes

    def append(self, key: Tensor, value: Tensor) -> None:
        """Append P positions; only they are copied.

        Args:
            key: `[B, P, C]`, in the memory's dtype and on its device; any strides. P may span pages.
            value: `[B, P, V]`, likewise.

        Raises:
            ValueError: a shape, dtype or device is not this memory's, or a tensor requires gradients: append under
                `torch.no_grad()`, or detached tensors.
        """
        self.check(key, value)
        self._pages.write(len(self), key, value)

    def replace(self, start: int, key: Tensor, value: Tensor) -> None:
        """Overwrite the P positions from `start` on.

        Args:
            start: the first of them.
            key, value: as in `append`.

        Raises:
            ValueError: as in `append`, or they are not all held.
        """
        self.check(key, value)
        self._check_range(start, key.shape[1])
        self._pages.write(start, key, value)

    def drop(self, count: int, start: int | None = None) -> None:
        """Remove positions; the last ones move into the gap, so that no others are copied.

        Empty pages are kept for later positions, see `free_unused`.

        Args:
            count: how many positions.
            start: the first of them; None drops the last ones.

        Raises:
            ValueError: they are not all held.
        """
        self._check_range(start or 0, count)
        if start is None:
            self._pages.truncate(len(self) - count)
        else:
            self.drop_at(torch.arange(start, start + count))

    def drop_at(self, places: Tensor) -> Tensor:
        """Remove the positions at some places; the last ones move into the gaps, so that no others are copied.

        Args:
            places: `[D]`, integers on any device, no place twice.

        Returns:
            `[N - D]`, for every place that is left the one where its position was before; on the CPU.

        Raises:
            ValueError: a place holds no position, or is named twice.
        """
        places = places.cpu()
        stays = torch.ones(len(self), dtype=torch.bool)
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(self):
            raise ValueError(f"places: expected 0 to {len(self) - 1}, got {int(places.min())} to {int(places.max())}")
        stays[places] = False
        length = int(stays.sum())
        if length != len(self) - len(places):
            raise ValueError("places: expected each place once, got one twice")
        gaps, moving = (~stays[:length]).nonzero()[:, 0], stays[length:].nonzero()[:, 0] + length
        self._pages.move(moving, gaps)
        self._pages.truncate(length)
        order = torch.arange(length)
        order[gaps] = moving
        return order

    def free_unused(self) -> None:
        """Free the empty pages."""
        self._pages.free_unused()

    def state(self) -> dict[str, Any]:
        """All positions, page by page, for `torch.save`. Only the last page is copied: save before changes."""
        pages = self._pages.held()
        if pages and pages[-1][0].shape[1] < self.page_size:
            # torch.save writes the whole storage of a view
            key, value = pages[-1]
            pages[-1] = (key.clone(), value.clone())
        return {"pages": pages, "on_device": len(self._pages.on_device)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Replace all positions by those of a `state`, bit-equal and on the same side, device or host.

        Raises:
            ValueError: the state is of another batch, dtype or number of channels.
        """
        forms = [(self.batch, channels, self.dtype) for channels in self._pages.channels]
        for page in state["pages"]:
            if (found := [(len(tensor), tensor.shape[-1], tensor.dtype) for tensor in page]) != forms:
                raise ValueError(f"state: expected keys and values of (B, channels, dtype) {forms}, got {found}")
        self.drop(len(self))
        self.free_unused()
        limit, self._pages.device_pages = self.device_pages, state["on_device"]
        for key, value in state["pages"]:
            self._pages.write(len(self), key.to(self.device), value.to(self.device))
        self._pages.device_pages = limit

    def _check_range(self, start: int, count: int) -> None:
        if not 0 <= start <= len(self):
            raise ValueError(f"start: expected 0 to {len(self)}, got {start}")
        if not 0 <= count <= len(self) - start:
            raise ValueError(f"count: expected 0 to {len(self) - start} positions, got {count}")

    @overload
    def read(
        self,
        query_key: Tensor,
        *,
        return_lse: Literal[False] = False,
        return_skipped: Literal[False] = False,
        return_usage: Literal[False] = False,
        usage_weight: Tensor | None = None,
        **options: "Unpack[PageKeywords]",
    ) -> Tensor: ...
    @overload
    def read(
        self,
        query_key: Tensor,
        *,
        return_lse: bool = False,
        return_skipped: bool = False,
        return_usage: bool = False,
        usage_weight: Tensor | None = None,
        **options: "Unpack[PageKeywords]",
    ) -> Any: ...
    def read(
        self,
        query_key: Tensor,
        *,
        scale: float | None = None,
        similarity: str = "dot",
        top_k: int | None = None,
        skip: float = 0.0,
        return_lse: bool = False,
        return_skipped: bool = False,
        return_usage: bool = False,
        usage_weight: Tensor | None = None,
        implementation: str = "auto",
    ) -> Tensor | tuple[Tensor, ...]:
        """Read all positions, page by page.

        Args:
            query_key: `[B, M, C]`, on the memory's device.
            scale, similarity, skip, return_lse, return_skipped: as in `memory_read`.
            top_k: as in `memory_read`; with several pages the read is not differentiable.
            return_usage: also return the softmax mass of each position over all queries, `[B, N]`, as `memory_usage`
                does. It comes out of the read, with `top_k` and with pages of a CPU; elsewhere a second pass multiplies
                the keys once more.
            usage_weight: `[B, M]`, above 0, what each query counts in the usage; None is 1.
            implementation: as in `memory_read`; "reference" gathers the pages first and then holds the whole affinity.

        Returns:
            As `memory_read`, then the usage; an empty memory reads zeros, with a log-sum-exp of -inf.

        Raises:
            TypeError, ValueError, ImportError: as in `memory_read`.
        """
        options = ReadOptions(scale, similarity, None, None, top_k, skip, implementation)
        if not return_usage:
            return self.read_all(query_key, options).chosen(return_lse, return_skipped)
        if usage_weight is not None:
            check_rows("usage_weight", usage_weight, query_key, query_key.shape[:2], "[B, M]")
            if not (usage_weight > 0).all():
                raise ValueError(f"usage_weight: expected values above 0, got {usage_weight.min().item()}")
        if top_k is not None and implementation != "reference" and len(self):
            result, usage = read_top_k(self._pages, self._checked(query_key, options)[0], options, usage_weight)
        elif usage_comes_with_read(self._pages, query_key, options):
            checked = self._checked(query_key, options)[0]
            result, usage = read_with_usage(self._pages, checked, options, usage_weight)
        else:
            result, query_key = self.read_all(query_key, options), self._checked(query_key, options)[0]
            usage = usage_of_pages(self._pages, query_key, None if top_k else result.lse, options, usage_weight)
        chosen = result.chosen(return_lse, return_skipped)
        return (*chosen, usage) if isinstance(chosen, tuple) else (chosen, usage)

    def read_all(self, query_key: Tensor, options: ReadOptions) -> ReadResult:
        """`read` with all that it can return."""
        query_key, *nothing = self._checked(query_key, options)
        pages = -(-len(self) // self.page_size)
        if not pages:
            return read_checked(options, query_key, *nothing)
        if options.implementation == "reference":
            # a page from the host is overwritten by a later one
            keys, values = zip(*((key.clone(), value.clone()) for key, value in self._pages.stream()))
            return read_checked(options, query_key, *autocast_inputs(torch.cat(keys, 1), torch.cat(values, 1)))
        if options.top_k is not None and pages > 1:
            return read_top_k(self._pages, query_key, options)[0]
        merged: ReadResult | None = None
        done = 0
        if min(pages, len(self._pages.on_device)) > 1 and self._has_table_kernel(query_key, options):
            merged, done = self._read_by_table(query_key, options), len(self._pages.on_device)
        for page in self._pages.stream(done):
            part = read_checked(options, query_key, *autocast_inputs(*page))
            merged = part if merged is None else merge_results(merged, part)
        assert merged is not None
        return merged._replace(out=merged.out.to(query_key.dtype))

    def _checked(self, query_key: Tensor, options: ReadOptions) -> tuple[Tensor, ...]:
        """The query, and keys and values of no position, in autocast's dtype."""
        return checked_inputs(options, query_key, *self._pages.new_page(0))

    def _has_table_kernel(self, query_key: Tensor, options: ReadOptions) -> bool:
        """Whether the kernel that walks over a table of pages can read this; it has no backward pass."""
        differentiated = torch.is_grad_enabled() and query_key.requires_grad
        if differentiated or self.page_size % PAGE_MULTIPLE:
            return False
        return query_key.dtype == self.dtype and resolve_implementation(options.implementation, query_key) == "triton"

    def _read_by_table(self, query_key: Tensor, options: ReadOptions) -> ReadResult:
        """The read of the pages on the device, in one launch."""
        from stm_kernels.gpu.forward import PageTable, triton_read

        pages = self._pages.on_device
        addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in zip(*pages)]
        if addresses != self._addresses:
            # a kernel must not follow the addresses of pages that were freed
            self._addresses, self._table = addresses, torch.tensor(addresses, device=self.device)
        keys, values = self._table
        table = PageTable(keys, values, self.page_size, min(len(self), len(pages) * self.page_size))
        key, value = pages[0]
        _, _, scale, shift = flat(options, query_key, key[:, :0])
        bias = None
        if shift is not None:
            # squares of keys, of whole pages: the kernel looks at no position that is not held
            squares = [flat(options, query_key[:, :0], key)[0] for key, _ in pages]
            bias = torch.cat([square for square in squares if square is not None], 1)
        affinity = Affinity(query_key, key, scale, bias, may_hide=False)
        out, lse, skipped, _ = triton_read(affinity, value, options.dropped, table)
        return ReadResult(out, lse if shift is None else shift_back(lse, shift), skipped)

    def check(self, key: Tensor, value: Tensor) -> None:
        """Raise what `append` would raise."""
        self._check("key", key, self.key_channels)
        self._check("value", value, self.value_channels)
        if key.shape[1] != value.shape[1]:
            raise ValueError(f"value: expected P = {key.shape[1]} as in key, got {value.shape[1]}")

    def _check(self, name: str, tensor: Tensor, channels: int) -> None:
        check_local(name, tensor)
        if tensor.ndim != 3 or tensor.shape[0] != self.batch or tensor.shape[2] != channels:
            raise ValueError(f"{name}: expected [{self.batch}, P, {channels}], got {list(tensor.shape)}")
        for what, expected, got in (("dtype", self.dtype, tensor.dtype), ("device", self.device, tensor.device)):
            if expected != got:
                raise ValueError(f"{name}: expected {what} {expected} as in this memory, got {got}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected no gradients, a memory holds none; got requires_grad=True")
