"""A memory that grows by pages: appending copies the new positions and nothing else."""

from collections.abc import Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from stm_kernels.affinity import PAGE_MULTIPLE, Affinity, wide_dtype
from stm_kernels.memory.pages import Page, Pages, Parts
from stm_kernels.merge import merge_reads
from stm_kernels.operator import resolve_implementation
from stm_kernels.options import check_agreement, check_tensors, checked_affinity, checked_choice
from stm_kernels.read import memory_usage, read_with_float64_lse, top_k_of_parts


class PagedMemory:
    """Keys and values of a growing memory, in preallocated token-major pages.

    For inference: what is held carries no gradients, though a read is differentiable by its query.

    Args:
        batch: B, objects.
        key_channels: C.
        value_channels: V.
        page_size: positions per page.
        device_pages: how many pages may lie on the device; the others lie in the host's memory (pinned for a GPU), and
            stream through two pages on the device while they are read. None is as many as the device can hold.
        dtype: floating-point type of keys and values.
        device: where the memory is read.

    Raises:
        ValueError: a size is not positive.
        TypeError: `dtype` is no floating-point type.
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
        # addresses of the pages on the device, keys above values, made anew when there are more
        self._table: Tensor | None = None

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
        """How many pages may lie on the device: raised, it brings pages there from the host; lowered, none leave it."""
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
        """Bytes of the pages in the host's memory that lie there for want of room on the device."""
        return len(self._pages.on_host) * self._pages.page_nbytes

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add P positions; only they are copied, never what is already held.

        Args:
            key: `[B, P, C]`, in the memory's dtype and on its device; any strides. P may span pages.
            value: `[B, P, V]`, likewise.

        Raises:
            ValueError: a shape, dtype or device is not this memory's, or gradients would be lost: append under
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
        """Forget positions; the last ones move into the gap, so that no other is copied, and no read changes.

        Pages that become empty stay for the next positions, see `free_unused`.

        Args:
            count: how many positions.
            start: the first of them; None drops the last ones.

        Raises:
            ValueError: they are not all held.
        """
        self._check_range(start or 0, count)
        start = len(self) - count if start is None else start
        length = len(self) - count
        moving = max(start + count, length)
        for source, key, value in self._pages.read_back(moving, len(self) - moving):
            self._pages.write(start + source - moving, key, value)
        self._pages.truncate(length)

    def free_unused(self) -> None:
        """Give back the pages that hold nothing."""
        self._pages.free_unused()
        self._table = None

    def state(self) -> dict[str, Any]:
        """All that is held, page by page as it is held, for `torch.save`: only the last page is copied, so write it
        before the memory changes.
        """
        return {"pages": self._pages.filled(), "on_device": len(self._pages.on_device)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Hold what a memory of the same form held at its `state`, to the bit and where it lay, and nothing else.

        Raises:
            ValueError: its form is not this memory's.
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
        scale: float | None = None,
        similarity: str = "dot",
        top_k: int | None = None,
        skip: float = 0.0,
        return_lse: Literal[False] = False,
        return_skipped: Literal[False] = False,
        implementation: str = "auto",
    ) -> Tensor: ...
    @overload
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
        implementation: str = "auto",
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
        implementation: str = "auto",
    ) -> Tensor | tuple[Tensor, ...]:
        """Read everything held, page by page, merged as it goes: equal to `memory_read` of all positions at once.

        On a GPU one launch walks over a table of the pages, unless gradients are asked for.

        Args:
            query_key: `[B, M, C]`, in the memory's dtype and on its device.
            scale, similarity, skip, return_lse, return_skipped: as in `memory_read`.
            top_k: as in `memory_read`; of several pages a read is not differentiable.
            implementation: as in `memory_read`; "reference" gathers the pages first and then holds the whole affinity.

        Returns:
            As `memory_read`; with nothing held the read is zeros, with a log-sum-exp of -inf.

        Raises:
            TypeError, ValueError, ImportError: as in `memory_read`.
        """
        out, lse, skipped = self.read_with_float64_lse(
            query_key, scale=scale, similarity=similarity, top_k=top_k, skip=skip, implementation=implementation
        )
        results = [out]
        if return_lse:
            results.append(lse if out.dtype == torch.float64 else lse.float())
        if return_skipped:
            results.append(skipped)
        return tuple(results) if len(results) > 1 else out

    def read_with_float64_lse(
        self, query_key: Tensor, *, top_k: int | None = None, implementation: str = "auto", **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`read` with all it can return, and its log-sum-exp in float64, to merge it with other reads."""
        parts: Parts | list[Page] = self._pages.parts() if len(self) else [self._pages.new_page(0)]
        if implementation == "reference":
            # a page from the host is lent for one turn only
            keys, values = zip(*((key.clone(), value.clone()) for key, value in parts))
            parts = [(torch.cat(keys, 1), torch.cat(values, 1))]
        if len(parts) == 1:
            (page,) = parts
            return read_with_float64_lse(query_key, *page, top_k=top_k, implementation=implementation, **options)
        if top_k is not None:
            return top_k_of_parts(query_key, parts, top_k=top_k, implementation=implementation, **options)
        assert isinstance(parts, Parts)
        merged: tuple[Tensor, Tensor, Tensor] | None = None
        rest: Iterable[Page] = parts
        if len(parts.on_device) > 1 and self._one_launch_reads(query_key, implementation, **options):
            merged, rest = self._read_in_one_launch(query_key, parts.on_device, **options), parts.streamed()
        dtype = None
        for key, value in rest:
            out, lse, skipped = read_with_float64_lse(query_key, key, value, implementation=implementation, **options)
            dtype = out.dtype
            # merged in float32 or wider, so that the read is rounded once, not once a page
            part = (out.to(wide_dtype(dtype)), lse, skipped)
            merged = part if merged is None else _merged(merged, part)
        assert merged is not None
        return merged[0].to(dtype or query_key.dtype), *merged[1:]

    def usage(
        self,
        query_key: Tensor,
        lse: Tensor,
        *,
        scale: float | None = None,
        similarity: str = "dot",
        implementation: str = "auto",
    ) -> Tensor:
        """Sum what all queries of a read weigh each position held, as `memory_usage` does.

        Args:
            query_key, scale, similarity, implementation: of the read.
            lse: `[B, M]`, its log-sum-exp.

        Returns:
            `[B, N]` in float32 (float64 for float64 inputs).
        """
        usages = [
            memory_usage(query_key, key, lse=lse, scale=scale, similarity=similarity, implementation=implementation)
            for key, _ in self._pages.parts()
        ]
        return torch.cat(usages, 1) if usages else query_key.new_zeros(self.batch, 0, dtype=wide_dtype(query_key.dtype))

    def _one_launch_reads(self, query_key: Tensor, implementation: str, similarity: str = "dot", **others: Any) -> bool:
        """Whether a kernel that walks over a table of pages can read this; it has no backward pass."""
        differentiated = torch.is_grad_enabled() and query_key.requires_grad
        if differentiated or similarity != "dot" or self.page_size % PAGE_MULTIPLE:
            return False
        if query_key.dtype != self.dtype:
            return False
        return resolve_implementation(implementation, query_key) == "triton"

    def _read_in_one_launch(
        self,
        query_key: Tensor,
        pages: list[Page],
        *,
        scale: float | None = None,
        similarity: str = "dot",
        skip: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from stm_kernels.gpu.forward import PageTable, triton_read

        (key, value), held = self._pages.on_device[0], self._pages.on_device
        check_tensors(query_key=query_key)
        check_agreement(query_key, memory_key=key, memory_value=value)
        scale = checked_affinity(query_key, key, scale, similarity, None, None, "triton")
        _, skip = checked_choice(None, skip)
        if self._table is None or self._table.shape[1] != len(held):
            addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in zip(*held)]
            self._table = torch.tensor(addresses, device=self.device)
        length = sum(key.shape[1] for key, _ in pages)
        keys, values = self._table
        table = PageTable(keys, values, self.page_size, length)
        out, lse, skipped, _ = triton_read(Affinity(query_key, key, scale), value, skip, table)
        return out, lse, skipped

    def check(self, key: Tensor, value: Tensor) -> None:
        """Raise what `append` would raise."""
        self._check("key", key, self.key_channels)
        self._check("value", value, self.value_channels)
        if key.shape[1] != value.shape[1]:
            raise ValueError(f"value: expected P = {key.shape[1]} as in key, got {value.shape[1]}")

    def _check(self, name: str, tensor: Tensor, channels: int) -> None:
        if tensor.ndim != 3 or tensor.shape[0] != self.batch or tensor.shape[2] != channels:
            raise ValueError(f"{name}: expected [{self.batch}, P, {channels}], got {list(tensor.shape)}")
        for what, expected, got in (("dtype", self.dtype, tensor.dtype), ("device", self.device, tensor.device)):
            if expected != got:
                raise ValueError(f"{name}: expected {what} {expected} as in this memory, got {got}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected no gradients, a memory holds none; got requires_grad=True")


def _merged(
    first: tuple[Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Two reads to one: the read, its log-sum-exp, and the share of the weight that was left out."""
    (outs, lses, skipped) = (torch.stack(pair) for pair in zip(first, second))
    out, lse = merge_reads(outs, lses)
    shares = (lses - lse.masked_fill(lse.isneginf(), 0.0)).exp()
    return out, lse, (shares * skipped).sum(0).float()
