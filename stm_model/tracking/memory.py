"""Keys and values of the remembered frames, within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from stm_kernels import PagedMemory
from stm_model.network import as_positions
from stm_model.tracking.budget import MemoryBudget, MemoryRule, budget_page, too_small

USAGE_DECAY = 0.95
"""What a read counts for at the next one: half of it after 14 reads."""


@dataclass
class _Frame:
    """A remembered frame."""

    index: int
    given: bool
    """Whether the user gave its mask."""
    used: float = 0.0
    """Its share of the weight of each read, decayed and summed."""
    reads: float = 0.0
    """Number of reads, decayed likewise."""

    @property
    def importance(self) -> float:
        """Mean share of recent reads; its index, as long as it was not read."""
        return self.used / self.reads if self.reads else self.index


class SpaceTimeMemory:
    """Keys and values of the remembered frames, for objects that entered the video at one frame.

    A frame is appended without touching what is already held. At most one frame, the newest, is temporary.

    Args:
        rule: which frames are remembered.
        objects: n, how many objects there are.
        limit: bytes on the device within which frames have to stay, by which pages are measured; None is no limit.
        weighed: whether to note how much every frame is used.
        read_options: those of `PagedMemory.read`.
    """

    def __init__(
        self, rule: MemoryRule, objects: int, *, limit: int | None = None, weighed: bool = False, **read_options: Any
    ) -> None:
        self.rule, self.objects, self.limit = rule, objects, limit
        self.weighed, self.read_options = weighed, read_options
        self.pages: PagedMemory | None = None
        self.frames: list[_Frame] = []
        """In the order in which their positions lie in memory."""
        self.positions = 0
        """Of each frame."""
        self._temporary = False

    def nbytes_with(self, more: int) -> int:
        """Bytes held when so many more frames are."""
        if self.pages is None:
            return 0
        pages = -(-(len(self.frames) + more) * self.positions // self.pages.page_size)
        return pages * self.pages.page_nbytes

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
        self.frames.append(_Frame(frame_index, given))
        self._temporary = not kept

    def forget_temporary(self) -> None:
        """Drop the frame that was only there as the previous one."""
        if self._temporary:
            self.evict(len(self.frames) - 1)
            self._temporary = False

    def evict(self, place: int) -> None:
        """Forget the frame at a place of `frames`; the last one takes its place."""
        assert self.pages is not None
        self.pages.drop(self.positions, place * self.positions)
        last = self.frames.pop()
        if place < len(self.frames):
            self.frames[place] = last

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
        readout, lse = self.pages.read(queries, return_lse=True, **self.read_options)
        if self.weighed:
            self._weigh(queries, lse)
        similarity = lse - math.log(len(self.pages))
        sharing = self.objects // self.pages.batch
        return (
            rearrange(readout, "k (h w) (n v) -> (k n) v h w", h=height, w=width, n=sharing),
            repeat(similarity, "k (h w) -> (k n) h w", h=height, w=width, n=sharing),
        )

    def _weigh(self, queries: Tensor, lse: Tensor) -> None:
        assert self.pages is not None
        names = self.read_options.keys() & {"similarity", "implementation"}
        usage = self.pages.usage(queries, lse, **{name: self.read_options[name] for name in names}).sum(0)
        shares = rearrange(usage / usage.sum(), "(t p) -> t p", t=len(self.frames)).sum(1)
        for frame, share in zip(self.frames, shares.tolist(), strict=True):
            frame.used = frame.used * USAGE_DECAY + share
            frame.reads = frame.reads * USAGE_DECAY + 1

    def state(self) -> dict[str, Any]:
        """All it holds, as `PagedMemory.state`."""
        return {
            "objects": self.objects,
            "frames": [[frame.index, frame.given, frame.used, frame.reads] for frame in self.frames],
            "positions": self.positions,
            "temporary": self._temporary,
            "pages": self.pages.state() if self.pages is not None and self.frames else None,
        }

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Hold what another one held at its `state`, on a device."""
        self.frames = [_Frame(*frame) for frame in state["frames"]]
        self.positions, self._temporary = state["positions"], state["temporary"]
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
        self.evicted = 0
        """Frames forgotten to stay within the budget."""
        self.most = {"device": 0, "host": 0}
        """Peak bytes."""

    def add_objects(self, count: int) -> None:
        """Take in objects that enter the video together."""
        weighed = self.budget.total is not None and self.budget.eviction == "importance"
        memory = SpaceTimeMemory(self.rule, count, limit=self.budget.device, weighed=weighed, **self.read_options)
        self.memories.append(memory)

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
            pages = self._pages()
            self.most["device"] = max(self.most["device"], sum(each.device_nbytes for each in pages))
            self.most["host"] = max(self.most["host"], sum(each.host_nbytes for each in pages))

    def state(self) -> dict[str, Any]:
        """All that is remembered, as `PagedMemory.state`."""
        return {
            "memories": [memory.state() for memory in self.memories],
            "evicted": self.evicted,
            "most": dict(self.most),
        }

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Remember what another bank of the same settings did at its `state`, on a device, and nothing else."""
        self.memories = []
        for memory in state["memories"]:
            self.add_objects(memory["objects"])
            self.memories[-1].load_state(memory, device)
        self.evicted, self.most = state["evicted"], dict(state["most"])

    def _pages(self) -> list[PagedMemory]:
        return [memory.pages for memory in self.memories if memory.pages is not None]

    def _make_room(self, memory: SpaceTimeMemory, frame_index: int) -> None:
        """Evict frames until this one fits into a memory, but not from others that have just taken it in."""
        device, total = self.budget.device, self.budget.total
        if device is None or total is None:
            return
        while (needed := sum(other.nbytes_with(other is memory) for other in self.memories)) > total:
            candidates = [
                (frame.importance if self.budget.eviction == "importance" else frame.index, other, place)
                for other in self.memories
                for place, frame in enumerate(other.frames)
                if not frame.given and frame.index != frame_index
            ]
            if not candidates:
                raise too_small(needed, sum(other.objects for other in self.memories), total)
            _, other, place = min(candidates, key=lambda candidate: candidate[0])
            other.evict(place)
            self.evicted += 1
        held = self._pages()
        for pages in held:
            pages.free_unused()
        for pages in held:
            others = sum(other.device_nbytes for other in held if other is not pages)
            pages.device_pages = max(0, device - others) // pages.page_nbytes
