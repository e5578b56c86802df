"""Keys and values of the remembered frames, within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from stm_kernels import PagedMemory
from stm_model.network import as_positions
from stm_model.tracking.budget import GIVEN_SHARE, MemoryBudget, MemoryRule, budget_page, too_small

USAGE_DECAY = 0.95
"""What a read counts for at the next one: half of it after 14 reads."""
PROBATION = 5
"""For so many frames a position stays, however little it is used: nothing is known of it yet."""
FRAME, GIVEN, USED, USE = range(4)
"""Columns of what is noted of a position: the frame that it is of, whether the user gave that frame's mask, its share
of the mass of each read, decayed and summed, and the same not decayed.
"""


class SpaceTimeMemory:
    """Keys and values of remembered positions, for objects that entered the video at one frame.

    A frame is appended without touching what is already held. At most one frame, the newest, is temporary.

    Args:
        rule: which frames are remembered.
        objects: n, how many objects there are.
        limit: bytes on the device within which positions have to stay, by which pages are measured; None is no limit.
        weighed: whether to note how much every position is used.
        read_options: those of `PagedMemory.read`.
    """

    def __init__(
        self, rule: MemoryRule, objects: int, *, limit: int | None = None, weighed: bool = False, **read_options: Any
    ) -> None:
        self.rule, self.objects, self.limit = rule, objects, limit
        self.weighed, self.read_options = weighed, read_options
        self.pages: PagedMemory | None = None
        self.notes = torch.zeros(0, 4, dtype=torch.float64)
        """`[N, 4]`, a row for every position, in the order in which they lie in memory."""
        self.positions = 0
        """Of each frame."""
        self.seen = 0
        """Positions that were to stay for good."""
        self.dropped = 0
        """Positions dropped of these."""
        self.dropped_use = 0.0
        """The share of each read's mass that lay on them, summed."""
        self._temporary = False

    @property
    def frames(self) -> list[int]:
        """The frames of which positions are held, in order."""
        return self.notes[:, FRAME].unique().long().tolist()

    def pages_with(self, more: int) -> int:
        """Pages held when so many more positions are."""
        return 0 if self.pages is None else -(-(len(self.notes) + more) // self.pages.page_size)

    def nbytes_with(self, more: int) -> int:
        """Bytes held when so many more positions are."""
        return 0 if self.pages is None else self.pages_with(more) * self.pages.page_nbytes

    def prepare(self, key: Tensor, value: Tensor) -> PagedMemory:
        """The pages, for frames with such keys and values, see `remember`, in their dtype and on their device."""
        if self.pages is None:
            self.positions = key.shape[-2] * key.shape[-1]
            value = _beside(value, len(key))
            self.pages = self._make_pages(len(key), key.shape[1], value.shape[1], key.dtype, key.device)
        return self.pages

    def _make_pages(
        self, keys: int, key_channels: int, value_channels: int, dtype: torch.dtype, device: torch.device
    ) -> PagedMemory:
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        if self.limit is not None:
            position_bytes = keys * (key_channels + value_channels) * dtype.itemsize
            options["page_size"] = budget_page(self.limit, self.positions, position_bytes)
        return PagedMemory(keys, key_channels, value_channels, **options)

    def remember(self, frame_index: int, given: bool, kept: bool, key: Tensor, value: Tensor) -> None:
        """Add a frame, a temporary one unless it is `kept`.

        Args:
            frame_index: of the frame.
            given: whether the user gave a mask of it.
            kept: whether it stays for good.
            key: `[n, C, h, w]`, or `[1, C, h, w]` where the n objects share it.
            value: `[n, V, h, w]`.
        """
        self.prepare(key, value).append(as_positions(key), as_positions(_beside(value, len(key))))
        note = self.notes.new_tensor([frame_index, given, 0, 0])
        self.notes = torch.cat([self.notes, note.expand(self.positions, -1)])
        self.seen += self.positions * kept
        self._temporary = not kept

    def forget_temporary(self) -> None:
        """Drop the frame that was only there as the previous one."""
        if self._temporary and self.pages is not None:
            self.pages.drop(self.positions)
            self.notes, self._temporary = self.notes[: len(self.pages)].clone(), False

    def stay(self, frame_index: int, given: int | None = None) -> Tensor:
        """`[N]`, which positions may not be dropped: of this frame, and of given masks, so many, the most used."""
        stays = self.notes[:, GIVEN] == 1
        if given is not None and given < stays.sum():
            used = self.notes[:, USED].masked_fill(~stays, -1)
            stays = torch.zeros_like(stays).index_fill_(0, used.argsort(descending=True, stable=True)[:given], True)
        return stays | (self.notes[:, FRAME] == frame_index)

    def evict(self, places: Tensor) -> None:
        """Drop positions; the last ones take their places."""
        assert self.pages is not None
        self.dropped += len(places)
        self.dropped_use += self.notes[places, USE].sum().item()
        self.notes = self.notes[self.pages.drop_at(places)]

    def evict_least(self, count: int, stays: Tensor, frame_index: int) -> None:
        """Drop so many of the positions that need not stay: those used least, on probation only after all others."""
        new = self.notes[:, FRAME] > frame_index - PROBATION
        order = torch.where(new, torch.inf, self.notes[:, USED]).masked_fill_(stays, torch.nan)
        self.evict(order.argsort(stable=True)[:count])

    def remove(self, place: int) -> None:
        """Forget one of several objects."""
        staying = torch.tensor([other for other in range(self.objects) if other != place])
        self.objects -= 1
        if self.pages is None:
            return
        before, state = self.pages, self.pages.state()
        # values lie side by side under one key, or every object has keys of its own
        channels, batch = before.value_channels, before.batch
        sharing = batch <= self.objects

        def without(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            index = staying.to(key.device)
            if not sharing:
                return key[index], value[index]
            parts = rearrange(value, "k p (n v) -> k p n v", n=self.objects + 1)
            return key, rearrange(parts[:, :, index], "k p n v -> k p (n v)")

        if sharing:
            channels = channels // (self.objects + 1) * self.objects
        else:
            batch -= 1
        options: dict[str, Any] = {"page_size": before.page_size, "dtype": before.dtype, "device": before.device}
        self.pages = PagedMemory(batch, before.key_channels, channels, **options, device_pages=before.device_pages)
        self.pages.load_state(state | {"pages": [without(*page) for page in state["pages"]]})

    def read(self, query_key: Tensor) -> tuple[Tensor, Tensor]:
        """What each of the n objects reads at every position of a frame, and how familiar the position is.

        Args:
            query_key: `[1, C, h, w]`.

        Returns:
            The readout `[n, V, h, w]`, and the log of the mean exponential similarity `[n, h, w]`.
        """
        assert self.pages is not None
        height, width = query_key.shape[-2:]
        queries = as_positions(query_key).expand(self.pages.batch, -1, -1)
        readout, lse, *usage = self.pages.read(queries, return_lse=True, return_usage=self.weighed, **self.read_options)
        if usage:
            mass = usage[0].double().sum(0).cpu()
            mass /= mass.sum()
            self.notes[:, USED] = self.notes[:, USED] * USAGE_DECAY + mass
            self.notes[:, USE] += mass
        similarity = lse - math.log(len(self.pages))
        sharing = self.objects // self.pages.batch
        return (
            rearrange(readout, "k (h w) (n v) -> (k n) v h w", h=height, w=width, n=sharing),
            repeat(similarity, "k (h w) -> (k n) h w", h=height, w=width, n=sharing),
        )

    def state(self) -> dict[str, Any]:
        """All it holds, as `PagedMemory.state`."""
        return {
            "objects": self.objects,
            "notes": self.notes,
            "counts": [self.positions, self.seen, self.dropped, self.dropped_use, self._temporary],
            "pages": self.pages.state() if self.pages is not None and len(self.notes) else None,
        }

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Hold what another one held at its `state`, on a device."""
        self.notes = state["notes"].clone()
        self.positions, self.seen, self.dropped, self.dropped_use, self._temporary = state["counts"]
        if state["pages"] is not None:
            key, value = state["pages"]["pages"][0]
            self.pages = self._make_pages(len(key), key.shape[2], value.shape[2], key.dtype, device)
            self.pages.load_state(state["pages"])


def _beside(value: Tensor, keys: int) -> Tensor:
    """Values `[n, V, h, w]` of objects that share a key side by side, `[keys, n/keys·V, h, w]`."""
    return rearrange(value, "(k n) v h w -> k (n v) h w", k=keys)


class Entry(NamedTuple):
    """How a frame enters a memory."""

    memory: SpaceTimeMemory
    part: slice
    """Its objects among all of the video."""
    given: bool
    """Whether the user gave the mask of one of them."""
    kept: bool
    """Whether the frame stays for good."""


class MemoryBank:
    """The memories of all objects of a video, kept within a budget.

    Objects that entered at the same frame share a memory.

    Args:
        rule: which frames are remembered.
        budget: how much, and what is forgotten for it.
        read_options: those of `PagedMemory.read`.
    """

    def __init__(self, rule: MemoryRule, budget: MemoryBudget, **read_options: Any) -> None:
        self.rule, self.budget, self.read_options = rule, budget, read_options
        self.memories: list[SpaceTimeMemory] = []
        self.most = {"device": 0, "host": 0}
        """Peak bytes."""

    def add_objects(self, count: int) -> None:
        """Take in objects that enter the video together."""
        limited = self.budget.total is not None or self.budget.share is not None
        weighed = limited and self.budget.eviction == "use"
        memory = SpaceTimeMemory(self.rule, count, limit=self.budget.device, weighed=weighed, **self.read_options)
        self.memories.append(memory)

    def remove(self, place: int) -> None:
        """Forget the object at that place among all."""
        for memory in self.memories:
            if place < memory.objects:
                break
            place -= memory.objects
        if memory.objects == 1:
            self.memories.remove(memory)
        else:
            memory.remove(place)

    def read(self, query_key: Tensor) -> tuple[Tensor, Tensor]:
        """What every object reads, and how familiar each position is, as `SpaceTimeMemory.read`."""
        readouts, similarities = zip(*(memory.read(query_key) for memory in self.memories))
        return torch.cat(readouts), torch.cat(similarities)

    def wanted(self, frame_index: int, given: Sequence[bool], certain: Sequence[bool]) -> list[Entry]:
        """Forget the temporary frame, and say which memories the next frame is segmented with this one in.

        Args:
            frame_index: of the frame that was segmented last.
            given: for each object whether the user gave its mask.
            certain: for each object whether its mask can be relied on; a frame with one that cannot is not kept.
        """
        entries, start = [], 0
        for memory in self.memories:
            memory.forget_temporary()
            part = slice(start, start := start + memory.objects)
            mask_given = any(given[part])
            kept = self.rule.keeps(frame_index, mask_given) and (mask_given or all(certain[part]))
            if kept or self.rule.previous:
                entries.append(Entry(memory, part, mask_given, kept))
        return entries

    def remember(self, frame_index: int, entries: Sequence[Entry], key: Tensor, value: Tensor) -> None:
        """Put a frame into the memories that want it.

        Args:
            frame_index: of the frame.
            entries: what `wanted` returned.
            key: `[n, C, h, w]` of all n objects, or `[1, C, h, w]` if they share it.
            value: `[n, V, h, w]`.

        Raises:
            ValueError: the budget does not hold even the frames that must stay; the message says what would.
        """
        for memory, part, given, kept in entries:
            keys, values = key if len(key) == 1 else key[part], value[part]
            memory.prepare(keys, values)
            self._make_room(memory, frame_index)
            memory.remember(frame_index, given, kept, keys, values)
            if kept and self.budget.share is not None:
                self._keep_share(memory, frame_index, self.budget.share)
            pages = self._pages()
            self.most["device"] = max(self.most["device"], sum(each.device_nbytes for each in pages))
            self.most["host"] = max(self.most["host"], sum(each.host_nbytes for each in pages))

    def state(self) -> dict[str, Any]:
        """All that is remembered, as `PagedMemory.state`."""
        return {
            "memories": [memory.state() for memory in self.memories],
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
        self.memories = []
        for memory in state["memories"]:
            self.add_objects(memory["objects"])
            self.memories[-1].load_state(memory, device)
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
