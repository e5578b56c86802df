"""A memory that grows by pages: appending copies the new positions and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from stm_kernels.merge import merge_reads
from stm_kernels.read import memory_read


class PagedMemory:
    """Keys and values of a growing memory, in preallocated token-major pages. For inference: no gradients flow.

    Args:
        batch: B, objects.
        key_channels: C.
        value_channels: V.
        page_size: positions per page.
        dtype: floating-point type of keys and values.
        device: where the pages live.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        batch: int,
        key_channels: int,
        value_channels: int,
        *,
        page_size: int = 8192,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        sizes = {"batch": batch, "key_channels": key_channels, "value_channels": value_channels, "page_size": page_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.batch, self.key_channels, self.value_channels = batch, key_channels, value_channels
        self.page_size, self.dtype, self.device = page_size, dtype, torch.device(device)
        self._pages: list[tuple[Tensor, Tensor]] = []
        self._length = 0

    def __len__(self) -> int:
        """Positions held."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, full or not."""
        return sum(key.nbytes + value.nbytes for key, value in self._pages)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add P positions: key `[B, P, C]` and value `[B, P, V]`; P may span pages.

        Raises:
            ValueError: a shape is not that of this memory.
        """
        self._check("key", key, self.key_channels)
        self._check("value", value, self.value_channels)
        if key.shape[1] != value.shape[1]:
            raise ValueError(f"value: expected {key.shape[1]} positions like key, got {value.shape[1]}")
        done, total = 0, key.shape[1]
        while done < total:
            page, start = divmod(self._length, self.page_size)
            if page == len(self._pages):
                self._pages.append(self._new_page())
            count = min(total - done, self.page_size - start)
            for held, new in zip(self._pages[page], (key, value), strict=True):
                held[:, start : start + count] = new[:, done : done + count].detach()
            self._length += count
            done += count

    def drop_last(self, count: int) -> None:
        """Forget the newest `count` positions; their pages stay for the next ones.

        Raises:
            ValueError: fewer positions are held.
        """
        if not 0 <= count <= self._length:
            raise ValueError(f"count: expected 0…{self._length} positions, got {count}")
        self._length -= count

    def read(
        self,
        query_key: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        implementation: str = "auto",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Read everything held, page by page; equal to `memory_read` of all positions at once.

        `implementation="reference"` gathers the pages first and then holds the whole affinity, as public code does.
        Args and returns are those of `memory_read`.
        """
        parts = self._parts()
        if implementation == "reference" or len(parts) == 1:
            key, value = (torch.cat(tensors, 1) if len(parts) > 1 else tensors[0] for tensors in zip(*parts, strict=True))
            return memory_read(
                query_key, key, value, scale=scale, return_lse=return_lse, implementation=implementation
            )
        out = lse = None
        for key, value in parts:
            part = memory_read(query_key, key, value, scale=scale, return_lse=True, implementation=implementation)
            if out is None:
                out, lse = part
            else:
                out, lse = merge_reads(torch.stack([out, part[0]]), torch.stack([lse, part[1]]))
        return (out, lse) if return_lse else out

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """The filled part of every page; one empty part where nothing is held."""
        if not self._length:
            return [tuple(torch.empty(self.batch, 0, size, dtype=self.dtype, device=self.device)
                          for size in (self.key_channels, self.value_channels))]
        used = -(-self._length // self.page_size)
        filled = [min(self.page_size, self._length - page * self.page_size) for page in range(used)]
        return [(key[:, :count], value[:, :count]) for (key, value), count in zip(self._pages, filled, strict=False)]

    def _new_page(self) -> tuple[Tensor, Tensor]:
        return tuple(
            torch.empty(self.batch, self.page_size, size, dtype=self.dtype, device=self.device)
            for size in (self.key_channels, self.value_channels)
        )

    def _check(self, name: str, tensor: Tensor, channels: int) -> None:
        if tensor.ndim != 3 or tensor.shape[0] != self.batch or tensor.shape[2] != channels:
            raise ValueError(f"{name}: expected [{self.batch}, P, {channels}], got {list(tensor.shape)}")
