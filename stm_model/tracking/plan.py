"""What tracking a video will remember, before it is tracked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from stm_model.labels import objects_in
from stm_model.network import STRIDE
from stm_model.tracking.budget import MemoryBudget, budget_page, format_size
from stm_model.tracking.memory import MemoryRule


@dataclass(frozen=True)
class MemoryPlan:
    """What a video's tracking will remember at most."""

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

    def __str__(self) -> str:
        whole = self.frames * self.frame_bytes
        text = (
            f"{self.frames} frames of {self.size[0]}×{self.size[1]} pixels and {self.objects} objects: "
            f"{format_size(whole)}, {format_size(self.frame_bytes)} a frame"
        )
        if self.held is None or self.frames <= self.held:
            return text
        return f"{text}; the budget of {format_size(self.budget.total)} holds about {self.held} of them"


@dataclass(frozen=True)
class _Group:
    """Objects that enter the video together and share a memory."""

    labels: frozenset[int]
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
        rule: which frames are remembered.
        budget: how much.
        masks: frame index → labels.
        frame_count: of the video.
        size: height and width at which the network sees a frame, multiples of its stride.
        position_bytes: of the keys and values at one position of so many objects that entered together.

    Raises:
        ValueError: the budget does not hold what may not be evicted; the message says what would.
    """
    groups = _groups(masks)
    objects = sum(len(group.labels) for group in groups)
    positions = size[0] * size[1] // STRIDE**2
    together = sum(position_bytes(len(group.labels)) for group in groups)

    def pages(limit: int, objects: int, frames: int) -> int:
        page = budget_page(limit, positions, position_bytes(objects))
        return -(-frames * positions // page) * page * position_bytes(objects)

    # what must stay changes with a given mask and with the frame after it; the last frame is not remembered
    moments = {min(given + after, frame_count - 2) for given in masks for after in (0, 1)}
    staying = [[(len(group.labels), group.staying(index, rule)) for group in groups] for index in moments]

    def least(limit: int) -> int:
        return max((sum(pages(limit, *memory) for memory in memories) for memories in staying), default=0)

    if budget.total is None:
        held = None
    else:
        needed = least(budget.device)
        if budget.total < needed:
            # a larger budget may have larger pages
            while (more := least(needed)) > needed:
                needed = more
            raise ValueError(
                f"memory budget: expected at least {format_size(needed)} for {objects} objects and the frames that "
                f"must stay, got {format_size(budget.total)}"
            )
        page = budget_page(budget.device, positions, together)
        held = budget.total // (page * together) * page // positions
    frame_bytes = positions * together
    return MemoryPlan(rule.most_frames(frame_count), objects, size, frame_bytes, budget, held)


def _groups(masks: Mapping[int, np.ndarray]) -> list[_Group]:
    named = {index: objects_in(masks[index]) for index in sorted(masks)}
    groups, known = [], set()
    for index, labels in named.items():
        if new := labels - known:
            known |= new
            given = tuple(other for other, given in named.items() if other >= index and given & new)
            groups.append(_Group(frozenset(new), given))
    return groups
