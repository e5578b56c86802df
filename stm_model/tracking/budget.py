"""How much may be remembered, and sizes as people write them."""

from __future__ import annotations

import re
from dataclasses import dataclass

EVICTIONS = ("fifo", "importance")
PAGE_MULTIPLE = 128
"""Pages of so many positions, or a multiple, are read fastest."""
PAGE_POSITIONS = 4096
"""Pages of fewer are read more slowly, for each is merged into the read: small frames share a page."""
PAGES_OF_BUDGET = 32
"""As many pages, or more, make up a budget: one that is not full wastes little of it."""


@dataclass(frozen=True)
class MemoryBudget:
    """How much may be remembered, and what is forgotten for it. Without limits everything is kept."""

    device: int | None = None
    """Bytes of keys and values on the device that reads them; None is as many as it can hold."""
    host: int | None = None
    """Further bytes in the host's memory; None is no limit where `device` has none, else 0. What `device` has beyond
    whole pages counts here."""
    eviction: str = "fifo"
    """What goes where both are full: the oldest frame (fifo), or the one that reads weigh least (importance). Frames
    with a given mask and the previous frame stay."""

    def __post_init__(self) -> None:
        for name in ("device", "host"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} budget: expected at least 0 bytes, got {getattr(self, name)}")
        if self.eviction not in EVICTIONS:
            raise ValueError(f"eviction: expected one of {', '.join(EVICTIONS)}, got {self.eviction!r}")

    @property
    def total(self) -> int | None:
        """Bytes in all; None is no limit."""
        return None if self.device is None else self.device + (self.host or 0)


def budget_page(limit: int, positions: int, position_bytes: int) -> int:
    """How many positions make a page under a budget.

    Args:
        limit: bytes on the device.
        positions: of a frame, which fits into a page.
        position_bytes: of keys and values at one position.
    """
    share = min(limit // PAGES_OF_BUDGET // position_bytes, PAGE_POSITIONS) // PAGE_MULTIPLE
    return max(share, -(-positions // PAGE_MULTIPLE)) * PAGE_MULTIPLE


UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes of a size like `2GiB`, `500 MB` or `4096`.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    unit = match and next((size for name, size in UNITS.items() if name.lower() == (match[2] or "B").lower()), None)
    if not match or not unit:
        raise ValueError(f"expected a size like 2GiB, 500MB or a number of bytes, got {text!r}")
    return int(float(match[1]) * unit)


def format_size(size: int) -> str:
    """A number of bytes in the unit that people read: `1.5 GiB`."""
    for name in ("GiB", "MiB", "KiB"):
        if size >= UNITS[name]:
            return f"{size / UNITS[name]:.1f} {name}"
    return f"{size} bytes"
