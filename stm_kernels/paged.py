"""A memory that grows by pages: appending copies the new positions and nothing else."""

from typing import Any

import torch
from torch import Tensor

from stm_kernels.affinity import PAGE_MULTIPLE, Affinity
from stm_kernels.checks import check_agreement, check_tensors, checked_affinity, checked_choice
from stm_kernels.merge import merge_reads
from stm_kernels.operator import resolve_implementation
from stm_kernels.read import read_with_float64_lse, top_k_of_parts


class PagedMemory:
    """Keys and values of a growing memory, in preallocated token-major pages.

    For inference: what is held carries no gradients, though a read is differentiable by its query.

    Args:
        batch: B, objects.
        key_channels: C.
        value_channels: V.
        page_size: positions per page.
        dtype: floating-point type of keys and values.
        device: where the pages live.

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
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = {"batch": batch, "key_channels": key_channels, "value_channels": value_channels, "page_size": page_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point type, got {dtype}")
        self.batch, self.key_channels, self.value_channels = batch, key_channels, value_channels
        self.page_size, self.dtype, self.device = page_size, dtype, torch.empty(0, device=device).device
        self._pages: list[tuple[Tensor, Tensor]] = []
        self._length = 0
        # addresses of all pages, keys above values, made anew when there are more
        self._table: Tensor | None = None

    def __len__(self) -> int:
        """Positions held."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, full or not."""
        return sum(key.nbytes + value.nbytes for key, value in self._pages)

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
        done, total = 0, key.shape[1]
        while done < total:
            page, start = divmod(self._length, self.page_size)
            if page == len(self._pages):
                self._pages.append(self._new_page())
            count = min(total - done, self.page_size - start)
            for held, new in zip(self._pages[page], (key, value)):
                held[:, start : start + count] = new[:, done : done + count]
            self._length += count
            done += count

    def drop_last(self, count: int) -> None:
        """Forget the newest positions; their pages stay for the next ones.

        Args:
            count: how many positions.

        Raises:
            ValueError: fewer positions are held.
        """
        if not 0 <= count <= self._length:
            raise ValueError(f"count: expected 0 to {self._length} positions, got {count}")
        self._length -= count

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
        parts = self._parts()
        if implementation == "reference":
            parts = [tuple(torch.cat(tensors, 1) for tensors in zip(*parts))]
        if len(parts) == 1:
            return read_with_float64_lse(query_key, *parts[0], top_k=top_k, implementation=implementation, **options)
        if top_k is not None:
            return top_k_of_parts(query_key, parts, top_k=top_k, implementation=implementation, **options)
        if self._one_launch_reads(query_key, implementation, **options):
            return self._read_in_one_launch(query_key, **options)
        merged = None
        for key, value in parts:
            out, lse, skipped = read_with_float64_lse(query_key, key, value, implementation=implementation, **options)
            # merged in float32 or wider, so that the read is rounded once, not once a page
            part = (out.to(torch.promote_types(out.dtype, torch.float32)), lse, skipped)
            merged = part if merged is None else _merged(merged, part)
        return merged[0].to(out.dtype), *merged[1:]

    def _one_launch_reads(self, query_key: Tensor, implementation: str, similarity: str = "dot", **others: Any) -> bool:
        """Whether a kernel that walks over a table of pages can read this; it has no backward pass."""
        differentiated = torch.is_grad_enabled() and query_key.requires_grad
        if differentiated or similarity != "dot" or self.page_size % PAGE_MULTIPLE or query_key.dtype != self.dtype:
            return False
        return resolve_implementation(implementation, query_key) == "triton"

    def _read_in_one_launch(
        self, query_key: Tensor, *, scale: float | None = None, similarity: str = "dot", skip: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        from stm_kernels.gpu.forward import PageTable, triton_read

        key, value = self._pages[0]
        check_tensors(query_key=query_key)
        check_agreement(query_key, memory_key=key, memory_value=value)
        scale = checked_affinity(query_key, key, scale, similarity, None, None, "triton")
        _, skip = checked_choice(None, skip)
        if self._table is None or self._table.shape[1] != len(self._pages):
            addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in zip(*self._pages)]
            self._table = torch.tensor(addresses, device=self.device)
        pages = PageTable(*self._table, self.page_size, len(self))
        return triton_read(Affinity(query_key, key, scale), value, skip, pages)[:3]

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """The filled part of every page in use; one empty part where nothing is held."""
        starts = range(0, self._length, self.page_size)
        if not starts:
            return [(self._empty(0, self.key_channels), self._empty(0, self.value_channels))]
        counts = (min(self.page_size, self._length - start) for start in starts)
        return [(key[:, :count], value[:, :count]) for (key, value), count in zip(self._pages, counts)]

    def _new_page(self) -> tuple[Tensor, Tensor]:
        # a tensor made in inference mode could never be appended to outside it
        with torch.inference_mode(False):
            return self._empty(self.page_size, self.key_channels), self._empty(self.page_size, self.value_channels)

    def _empty(self, positions: int, channels: int) -> Tensor:
        return torch.empty(self.batch, positions, channels, dtype=self.dtype, device=self.device)

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
