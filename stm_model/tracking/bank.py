"""The memories of all objects of a video, within a budget."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stm_kernels import PagedMemory
from stm_model.tracking.budget import GIVEN_SHARE, MemoryBudget, MemoryRule, too_small
from stm_model.tracking.memory import FRAME, PROBATION, USE, SpaceTimeMemory, sparse_places


class Entry(NamedTuple):
    """How a frame enters a memory."""

    memory: SpaceTimeMemory
    places: list[int]
    """Of its objects among all of the video."""
    given: int
    """How many frames it counts for, as the user gave the mask of one of them; 0 if not."""
    kept: bool
    """Whether the frame stays for good."""


class MemoryBank:
    """The memories of all objects of a video, kept within a budget.

    Objects that entered at the same frame share a memory, until one of them is corrected.

    Args:
        rule, budget: which frames are remembered, and how much.
        spacing: of `sparse_places`, for frames without a given mask.
        read_options: those of `PagedMemory.read`.
    """

    def __init__(self, rule: MemoryRule, budget: MemoryBudget, spacing: int = 1, **read_options: Any) -> None:
        self.rule, self.budget, self.spacing, self.read_options = rule, budget, spacing, read_options
        self.memories: list[SpaceTimeMemory] = []
        self.places: list[list[int]] = []
        """Of the objects of each memory among all."""
        self.most = {"device": 0, "host": 0}
        """Peak bytes."""

    def add_objects(self, count: int) -> None:
        """Take in objects that enter the video together."""
        limited = self.budget.total is not None or self.budget.share is not None
        weighed = limited and self.budget.eviction == "use"
        options = {"limit": self.budget.device, "spacing": self.spacing, "weighed": weighed, **self.read_options}
        memory = SpaceTimeMemory(self.rule, count, **options)
        self.memories.append(memory)
        known = sum(map(len, self.places))
        self.places.append(list(range(known, known + count)))

    def remove(self, place: int) -> None:
        """Forget the object at that place among all."""
        memories, places = self.memories, self.places
        self.memories, self.places = [], []
        for memory, held in zip(memories, places):
            staying = [index for index, other in enumerate(held) if other != place]
            if staying:
                self.memories.append(memory if len(staying) == memory.objects else memory.part(staying))
                self.places.append([held[index] - (held[index] > place) for index in staying])

    def forget_since(self, frames: Mapping[int, int]) -> None:
        """Forget what is remembered of some objects since a frame each, but for given masks.

        One that forgets more than those it shares a memory with gets one of its own; under a budget in bytes, which was
        planned without, it does not forget.

        Args:
            frames: place of an object among all → the last frame that stays.
        """
        memories, places = self.memories, self.places
        self.memories, self.places = [], []
        for memory, held in zip(memories, places):
            parts: dict[int | None, list[int]] = {}
            for index, place in enumerate(held):
                parts.setdefault(frames.get(place), []).append(index)
            if len(parts) > 1 and self.budget.total is not None:
                parts = {None: list(range(memory.objects))}
            if parts.keys() != {None}:
                memory.forget_temporary()
            for frame, objects in parts.items():
                part = memory if len(parts) == 1 else memory.part(objects)
                if frame is not None:
                    part.forget_since(frame)
                self.memories.append(part)
                self.places.append([held[index] for index in objects])

    def read(self, query_key: Tensor, cells: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What every object reads, and how familiar each position is, as `SpaceTimeMemory.read`."""
        each = zip(self.memories, self.places)
        reads = (memory.read(query_key, None if cells is None else cells[places]) for memory, places in each)
        readouts, similarities = map(torch.cat, zip(*reads))
        order = [place for held in self.places for place in held]
        if order == sorted(order):
            return readouts, similarities
        index = torch.tensor(order, device=readouts.device).argsort()
        return readouts[index], similarities[index]

    def wanted(self, frame_index: int, given: Sequence[int], certain: Sequence[bool]) -> list[Entry]:
        """Forget the temporary frame, and say which memories the next frame is segmented with this one in.

        Args:
            frame_index: of the frame that was segmented last.
            given: for each object how many frames its mask counts for, as the user gave it; 0 if not.
            certain: for each object whether its mask can be relied on; a frame with one that cannot is not kept.
        """
        entries = []
        for memory, places in zip(self.memories, self.places):
            memory.forget_temporary()
            counts = max(given[place] for place in places)
            kept = self.rule.keeps(frame_index, counts > 0) and (counts > 0 or all(certain[place] for place in places))
            if kept or self.rule.previous:
                entries.append(Entry(memory, places, counts, kept))
        return entries

    def remember(
        self,
        frame_index: int,
        entries: Sequence[Entry],
        key: Tensor,
        value: Tensor,
        cells: Tensor | None = None,
    ) -> None:
        """Put a frame into the memories that want it.

        Args:
            entries: what `wanted` returned.
            key: `[n, C, h, w]` of all n objects, or `[1, C, h, w]` if they share it.
            value: `[n, V, h, w]`.
            cells: `[n, h, w]`, how certainly each object is at each position; None is not known.

        Raises:
            ValueError: the budget does not hold even the frames that must stay; the message says what would.
        """
        sparse = None if cells is None or self.spacing == 1 else sparse_places(cells, self.spacing)
        for memory, places, given, kept in entries:
            # a slice where that will do, which copies nothing
            first, last = places[0], places[-1] + 1
            part = slice(first, last) if places == list(range(first, last)) else places
            keys, values = key if len(key) == 1 else key[part], value[part]
            memory.prepare(keys, values)
            for _ in range(given if kept and given and self.budget.total is None else 1):
                self._make_room(memory, frame_index)
                certain = None if cells is None else cells[part]
                chosen = sparse if kept and not given else None
                memory.remember(frame_index, given > 0, kept, keys, values, certain, chosen)
            if kept and self.budget.share is not None:
                self._keep_share(memory, frame_index, self.budget.share)
            pages = self._pages()
            self.most["device"] = max(self.most["device"], sum(each.device_nbytes for each in pages))
            self.most["host"] = max(self.most["host"], sum(each.host_nbytes for each in pages))

    def state(self) -> dict[str, Any]:
        """All that is remembered, as `PagedMemory.state`."""
        return {
            "memories": [memory.state() for memory in self.memories],
            "places": self.places,
            "most": dict(self.most),
        }

    def summary(self) -> dict[str, Any]:
        """Positions kept and dropped, and the dropped ones' share of the use of all in the reads so far."""
        kept = sum(len(memory.notes) for memory in self.memories)
        dropped = sum(memory.dropped for memory in self.memories)
        lost = sum(memory.dropped_use for memory in self.memories)
        use = lost + sum(memory.notes[:, USE].sum().item() for memory in self.memories)
        share = lost / use if use else None
        return {"positions_kept": kept, "positions_dropped": dropped, "share_of_use_dropped": share}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Remember what another bank of the same settings did at its `state`, on a device, and nothing else."""
        self.memories, self.places = [], []
        for memory in state["memories"]:
            self.add_objects(memory["objects"])
            self.memories[-1].load_state(memory, device)
        self.places = state["places"]
        self.most = dict(state["most"])

    def _pages(self) -> list[PagedMemory]:
        return [memory.pages for memory in self.memories if memory.pages is not None]

    def _make_room(self, memory: SpaceTimeMemory, frame_index: int) -> None:
        """Drop positions until this frame fits into a memory, but not from others that have just taken it in."""
        device, total = self.budget.device, self.budget.total
        if device is None or total is None:
            return
        while (
            needed := sum(other.nbytes_with(memory.positions * (other is memory)) for other in self.memories)
        ) > total:
            stays = [other.stay(frame_index) for other in self.memories]
            free = [int((~each).sum()) for each in stays]
            if not any(free):
                raise too_small(needed, sum(other.objects for other in self.memories), total)
            if self.budget.eviction == "fifo":
                frames = [other.notes[~each, FRAME] for other, each in zip(self.memories, stays)]
                oldest, place = min((each.min().item(), place) for place, each in enumerate(frames) if len(each))
                self.memories[place].evict((self.memories[place].notes[:, FRAME] == oldest).nonzero()[:, 0])
                continue
            # by a page, from the memory that holds most of what need not stay
            place = max(range(len(free)), key=free.__getitem__)
            other = self.memories[place]
            assert other.pages is not None
            excess = (len(other.notes) + memory.positions * (other is memory) - 1) % other.pages.page_size + 1
            other.evict_least(min(excess, free[place]), stays[place], frame_index)
        held = self._pages()
        for pages in held:
            pages.free_unused()
        for pages in held:
            others = sum(other.device_nbytes for other in held if other is not pages)
            pages.device_pages = max(0, device - others) // pages.page_nbytes

    @staticmethod
    def _keep_share(memory: SpaceTimeMemory, frame_index: int, share: float) -> None:
        """Drop what exceeds a share of all positions seen and one frame's, but for those on probation."""
        limit = max(math.ceil(share * memory.seen), memory.positions)
        settled = int((memory.notes[:, FRAME] <= frame_index - PROBATION).sum())
        if settled > limit:
            stays = memory.stay(frame_index, int(limit * GIVEN_SHARE))
            memory.evict_least(min(settled - limit, int((~stays).sum())), stays, frame_index)
