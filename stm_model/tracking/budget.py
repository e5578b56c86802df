"""What may be remembered: the rule, the budget, and the plan of a video; sizes as people write them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from stm_model.labels import objects_in
from stm_model.network import STRIDE

EVICTIONS = ("use", "fifo")
GIVEN_SHARE = 0.5
"""How much of a share of the memory is for positions of given masks, however little they are used."""
PAGE_MULTIPLE = 128
"""Pages of a multiple of so many positions are read fastest."""
PAGE_POSITIONS = 4096
"""Pages of fewer are read more slowly, as each is merged into the read: small frames share a page."""
MIN_PAGES = 32
"""A budget is at least so many pages, if a page holds a frame: a page that is not full wastes little of it."""


@dataclass(frozen=True)
class MemoryRule:
    """Which past frames a frame is segmented from.

    Source: Oh et al. 2019, figure 7, and the released code's fixed number of frames.
    """

    kept: frozenset[int] | int | None
    """Frames kept for good besides the first: every so many (a number), the named ones (a set), or none."""
    first: bool
    """Whether frames with a given mask are kept for good."""
    previous: bool
    """Whether the frame before the current one is in memory while the current one is read."""

    def __post_init__(self) -> None:
        if not (self.first or self.previous):
            raise ValueError("memory: expected a rule that remembers the first or the previous frame, got neither")

    @classmethod
    def parse(cls, text: str, frame_count: int | None = None) -> MemoryRule:
        """Read a rule from its name.

        Args:
            text: `first`, `previous`, `first+previous`, `every:N` (first, previous and every Nth frame),
                `first+every:N` (without the previous one) or `uniform:K` (first, previous and K frames spread evenly
                over the video).
            frame_count: the number of frames of the video; only `uniform:K` needs it.

        Raises:
            ValueError: the text is no rule, or `uniform:K` does not know the number of frames.
        """
        if text in ("first", "previous", "first+previous"):
            return cls(None, "first" in text, "previous" in text)
        name, _, number = text.partition(":")
        if name not in ("every", "first+every", "uniform") or not number.isdecimal() or int(number) < 1:
            raise ValueError(
                "memory: expected first, previous, first+previous, every:N, first+every:N or uniform:K (N, K ≥ 1), "
                f"got {text!r}"
            )
        if name != "uniform":
            return cls(int(number), True, name == "every")
        if frame_count is None:
            raise ValueError(f"memory: {text} needs the number of frames; give frame_count, or use every:N")
        grid = np.round(np.linspace(0, frame_count, int(number) + 2)[:-1]).astype(int)
        return cls(frozenset(grid.tolist()), True, True)

    def keeps(self, frame_index: int, mask_given: bool) -> bool:
        """Whether a frame stays in memory for good; `mask_given` if the user gave the mask."""
        if mask_given and self.first:
            return True
        if isinstance(self.kept, int):
            return frame_index % self.kept == 0
        return self.kept is not None and frame_index in self.kept

    def most_frames(self, frame_count: int) -> int:
        """How many frames are in memory at most while a video is tracked from the mask of its first frame."""
        held = most = 0
        for index in range(frame_count - 1):
            keeps = self.keeps(index, index == 0)
            most = max(most, held + (keeps or self.previous))
            held += keeps
        return most


@dataclass(frozen=True)
class MemoryBudget:
    """How much may be remembered, and what is evicted for it. Without limits everything is kept."""

    device: int | None = None
    """Bytes of keys and values on the device that reads them; None is as many as it can hold."""
    host: int | None = None
    """Further bytes in the host's memory; None is no limit where `device` has none, else 0. What `device` has beyond
    whole pages counts here."""
    eviction: str = "use"
    """What goes where both are full: the positions that reads use least (use), or the oldest frame (fifo). Positions of
    given masks and of the previous frame stay."""
    share: float | None = None
    """The most positions to keep, as a share of all that were to stay for good, in place of bytes. Those of the
    previous frame, and of frames on probation, are kept besides; half of it is for given masks."""

    def __post_init__(self) -> None:
        for name, size in (("device", self.device), ("host", self.host)):
            if size is not None and size < 0:
                raise ValueError(f"{name} budget: expected at least 0 bytes, got {size}")
        if self.eviction not in EVICTIONS:
            raise ValueError(f"eviction: expected one of {', '.join(EVICTIONS)}, got {self.eviction!r}")
        if self.share is None:
            return
        if not 0 < self.share <= 1:
            raise ValueError(f"memory share: expected a share above 0 and up to 1, got {self.share}")
        if self.device is not None or self.host is not None:
            raise ValueError("memory share: expected no budget in bytes beside it; choose one of them")
        if self.eviction != "use":
            raise ValueError(f"memory share: expected eviction by use beside it, got {self.eviction}")

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
    share = min(limit // MIN_PAGES // position_bytes, PAGE_POSITIONS) // PAGE_MULTIPLE
    return max(share, -(-positions // PAGE_MULTIPLE)) * PAGE_MULTIPLE


def too_small(needed: int, objects: int, total: int) -> ValueError:
    """The error of a budget that does not hold the frames that may not be evicted."""
    return ValueError(
        f"memory budget: expected at least {format_size(needed)} for {objects} objects and the frames that must stay, "
        f"got {format_size(total)}"
    )


@dataclass(frozen=True)
class MemoryPlan:
    """What tracking a video will remember at most."""

    frames: int
    """Frames in memory at once."""
    objects: int
    """Objects, each of which has keys and values of its own."""
    size: tuple[int, int]
    """Height and width at which the network sees them, in pixels."""
    frame_bytes: int
    """Bytes of one frame's keys and values."""
    budget: MemoryBudget
    """The limit."""
    held: int | None
    """About how many frames it holds; None is no limit."""

    def paged_bytes(self, frames: int) -> int:
        """Bytes of so many frames, each on a page of its own."""
        positions = self.size[0] * self.size[1] // STRIDE**2
        return frames * budget_page(0, positions, 1) * self.frame_bytes // positions

    def __str__(self) -> str:
        height, width = self.size
        text = (
            f"{self.frames} frames of {width}x{height} pixels and {self.objects} objects: "
            f"{format_size(self.frames * self.frame_bytes)}, {format_size(self.frame_bytes)} a frame"
        )
        if self.budget.share is not None:
            return f"{text}; {self.budget.share:g} of the positions are kept"
        if self.budget.total is None or self.held is None or self.frames <= self.held:
            return text
        return f"{text}; the budget of {format_size(self.budget.total)} holds about {self.held} of them"


@dataclass(frozen=True)
class _Group:
    """Objects that enter the video together and share a memory."""

    objects: int
    given: tuple[int, ...]
    """Frames with a mask of any of them."""

    def staying(self, frame_index: int, rule: MemoryRule) -> int:
        """How many of their frames may not be evicted while this one is put into memory."""
        if frame_index < self.given[0]:
            return 0
        kept = sum(given <= frame_index for given in self.given) if rule.first else 0
        return kept + (rule.previous and not (rule.first and frame_index in self.given))


def plan_memory(
    rule: MemoryRule,
    budget: MemoryBudget,
    masks: Mapping[int, np.ndarray],
    frame_count: int,
    size: tuple[int, int],
    position_bytes: Callable[[int], int],
) -> MemoryPlan:
    """Plan the memory of a video.

    Args:
        masks: frame index → labels.
        size: height and width at which the network sees a frame, multiples of its stride.
        position_bytes: of the keys and values at one position of so many objects that entered together.

    Raises:
        ValueError: the budget does not hold what may not be evicted; the message says what would.
    """
    groups = _groups(masks)
    objects = sum(group.objects for group in groups)
    positions = size[0] * size[1] // STRIDE**2
    # what must stay changes with a given mask and with the frame after it; the last frame is not remembered
    moments = {min(given + after, frame_count - 2) for given in masks for after in (0, 1)}
    staying = [[(group.objects, group.staying(index, rule)) for group in groups] for index in moments]

    def nbytes(limit: int, objects: int, frames: int) -> int:
        page = budget_page(limit, positions, position_bytes(objects))
        return -(-frames * positions // page) * page * position_bytes(objects)

    def least(limit: int) -> int:
        return max((sum(nbytes(limit, *memory) for memory in memories) for memories in staying), default=0)

    together, held = sum(position_bytes(group.objects) for group in groups), None
    if budget.device is not None and budget.total is not None:
        needed = least(budget.device)
        if budget.total < needed:
            # a larger budget may have larger pages
            while (more := least(needed)) > needed:
                needed = more
            raise too_small(needed, objects, budget.total)
        page = budget_page(budget.device, positions, together)
        held = budget.total // (page * together) * page // positions
    return MemoryPlan(rule.most_frames(frame_count), objects, size, positions * together, budget, held)


def _groups(masks: Mapping[int, np.ndarray]) -> list[_Group]:
    named = {index: objects_in(masks[index]) for index in sorted(masks)}
    groups: list[_Group] = []
    known: set[int] = set()
    for index, labels in named.items():
        if new := labels - known:
            known |= new
            groups.append(
                _Group(len(new), tuple(other for other, given in named.items() if other >= index and given & new))
            )
    return groups


UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes of a size like `2GiB`, `500 MB` or `4096`.

    Raises:
        ValueError: the text is no size.
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
