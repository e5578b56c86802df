"""Which frames are remembered, and their keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from stm_kernels import PagedMemory
from stm_model.network import as_positions
from stm_model.tracking.budget import MemoryBudget, budget_page, format_size


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
            text: `first`, `previous`, `first+previous`, `every:N` (first, previous and every Nth frame) or
                `uniform:K` (first, previous and K frames spread evenly over the video).
            frame_count: the number of frames of the video; only `uniform:K` needs it.

        Raises:
            ValueError: the text is no rule, or `uniform:K` does not know the number of frames.
        """
        if text in ("first", "previous", "first+previous"):
            return cls(None, "first" in text, "previous" in text)
        name, _, number = text.partition(":")
        if name not in ("every", "uniform") or not number.isdecimal() or int(number) < 1:
            raise ValueError(
                f"memory: expected first, previous, first+previous, every:N or uniform:K (N, K ≥ 1), got {text!r}"
            )
        if name == "every":
            return cls(int(number), True, True)
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
        kept = sum(self.keeps(index, index == 0) for index in range(frame_count - 1))
        temporary = frame_count > 1 and self.previous and not self.keeps(frame_count - 2, frame_count == 2)
        earlier = frame_count > 2 and self.previous and not self.keeps(frame_count - 3, frame_count == 3)
        return max(kept + temporary, kept - self.keeps(frame_count - 2, False) + earlier)


USAGE_DECAY = 0.95
"""What a frame's use counts for at the next read: half of it after 14 reads."""


@dataclass
class _Frame:
    """A remembered frame."""

    index: int
    given: bool
    """Whether the user gave its mask."""
    used: float = 0.0
    """Share of the reads' weight, summed up and decayed."""
    reads: float = 0.0
    """Number of reads, decayed likewise."""


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
        self,
        rule: MemoryRule,
        objects: int,
        *,
        limit: int | None = None,
        weighed: bool = False,
        **read_options: Any,
    ):
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

    def wants(self, frame_index: int, mask_given: bool, certain: bool = True) -> bool:
        """Whether the next frame is segmented with this one in memory; one that is not certain is not kept for good."""
        return self.rule.previous or self._keeps(frame_index, mask_given, certain)

    def _keeps(self, frame_index: int, mask_given: bool, certain: bool) -> bool:
        return self.rule.keeps(frame_index, mask_given) and (certain or mask_given)

    def prepare(self, key: Tensor, value: Tensor) -> None:
        """Make ready for frames with such keys and values, see `remember`, in their dtype, where they are."""
        if self.pages is None:
            self.positions = key.shape[-2] * key.shape[-1]
            value = _beside(value, len(key))
            self._make_pages(len(key), key.shape[1], value.shape[1], key.dtype, key.device)

    def _make_pages(
        self, keys: int, key_channels: int, value_channels: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        page = {}
        if self.limit is not None:
            position_bytes = keys * (key_channels + value_channels) * dtype.itemsize
            page["page_size"] = budget_page(self.limit, self.positions, position_bytes)
        sizes = keys, key_channels, value_channels
        self.pages = PagedMemory(*sizes, **page, dtype=dtype, device=device)

    def remember(self, frame_index: int, mask_given: bool, certain: bool, key: Tensor, value: Tensor) -> None:
        """Add a frame: value `[n, V, h, w]` of the n objects; key `[n, C, h, w]`, or `[1, C, h, w]` if it is shared."""
        self.prepare(key, value)
        self.pages.append(as_positions(key), as_positions(_beside(value, len(key))))
        self.frames.append(_Frame(frame_index, mask_given))
        self._temporary = not self._keeps(frame_index, mask_given, certain)

    def forget_temporary(self) -> None:
        """Drop the frame that was only there as the previous one."""
        if self._temporary:
            self.evict(len(self.frames) - 1)
            self._temporary = False

    def evict(self, place: int) -> None:
        """Forget the frame at a place of `frames`; the last one takes its place."""
        self.pages.drop(self.positions, place * self.positions)
        last = self.frames.pop()
        if place < len(self.frames):
            self.frames[place] = last

    def read(self, query_key: Tensor) -> tuple[Tensor, Tensor]:
        """What each of the n objects reads at every position of a frame, `[1, C, h, w]` → `[n, V, h, w]`, and how like
        what is remembered it is there: the log of the mean exponential similarity `[n, h, w]`.
        """
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

    def state(self) -> dict[str, Any]:
        """All it holds, as `PagedMemory.state`."""
        return {
            "frames": [[frame.index, frame.given, frame.used, frame.reads] for frame in self.frames],
            "positions": self.positions,
            "temporary": self._temporary,
            "pages": self.pages.state() if self.frames else None,
        }

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Hold what another one held at its `state`, on a device."""
        self.frames = [_Frame(*frame) for frame in state["frames"]]
        self.positions, self._temporary = state["positions"], state["temporary"]
        if state["pages"] is not None:
            key, value = state["pages"]["pages"][0]
            self._make_pages(len(key), key.shape[2], value.shape[2], key.dtype, device)
            self.pages.load_state(state["pages"])

    def _weigh(self, queries: Tensor, lse: Tensor) -> None:
        names = self.read_options.keys() & {"similarity", "implementation"}
        options = {name: self.read_options[name] for name in names}
        usage = self.pages.usage(queries, lse, **options).sum(0)
        shares = rearrange(usage / usage.sum(), "(t p) -> t p", t=len(self.frames)).sum(1)
        for frame, share in zip(self.frames, shares.tolist(), strict=True):
            frame.used = frame.used * USAGE_DECAY + share
            frame.reads = frame.reads * USAGE_DECAY + 1


def _beside(value: Tensor, keys: int) -> Tensor:
    """Values `[n, V, h, w]` of objects that share a key lie side by side, `[keys, n/keys·V, h, w]`."""
    return rearrange(value, "(k n) v h w -> k (n v) h w", k=keys)


class MemoryBank:
    """The memories of all objects of a video, kept within a budget.

    Objects that entered at the same frame share a memory.

    Args:
        rule: which frames are remembered.
        budget: how much, and what is forgotten for it.
        read_options: those of `PagedMemory.read`.
    """

    def __init__(self, rule: MemoryRule, budget: MemoryBudget, **read_options: Any):
        self.rule, self.budget, self.read_options = rule, budget, read_options
        self.memories: list[SpaceTimeMemory] = []
        self.counts: list[int] = []
        """Objects of each memory."""
        self.evicted = 0
        """Frames forgotten for want of room."""
        self.most = {"device": 0, "host": 0}
        """The most bytes that were held at once."""

    def add_objects(self, count: int) -> None:
        """Take in objects that enter the video together."""
        limits = {
            "limit": self.budget.device,
            "weighed": self.budget.total is not None and self.budget.eviction == "importance",
        }
        self.memories.append(SpaceTimeMemory(self.rule, count, **limits, **self.read_options))
        self.counts.append(count)

    def read(self, query_key: Tensor) -> tuple[Tensor, Tensor]:
        """What every object reads, and how like what is remembered it is, as `SpaceTimeMemory.read`."""
        reads = [memory.read(query_key) for memory in self.memories]
        return tuple(torch.cat(tensors) for tensors in zip(*reads))

    def wanted(self, frame_index: int, given: Sequence[bool], certain: Sequence[bool]) -> list[bool]:
        """Forget the temporary frame, and say which memories want this one; `given` tells for each object whether the
        user gave its mask, `certain` whether its mask is to be relied on.
        """
        for memory in self.memories:
            memory.forget_temporary()
        parts = zip(self.memories, self._parts(), strict=True)
        return [memory.wants(frame_index, any(given[part]), all(certain[part])) for memory, part in parts]

    def remember(
        self,
        frame_index: int,
        given: Sequence[bool],
        certain: Sequence[bool],
        wanted: Sequence[bool],
        key: Tensor,
        value: Tensor,
    ) -> None:
        """Put a frame into the memories that want it: value `[n, V, h, w]` of all n objects, and key
        `[n, C, h, w]`, or `[1, C, h, w]` if they share it.

        Raises:
            ValueError: the budget does not hold even the frames that must stay; the message says what would.
        """
        for memory, part, wants in zip(self.memories, self._parts(), wanted, strict=True):
            if not wants:
                continue
            keys, values = key if len(key) == 1 else key[part], value[part]
            memory.prepare(keys, values)
            self._make_room(memory, frame_index)
            memory.remember(frame_index, any(given[part]), all(certain[part]), keys, values)
            for place in ("device", "host"):
                held = sum(getattr(m.pages, f"{place}_nbytes") for m in self.memories if m.pages is not None)
                self.most[place] = max(self.most[place], held)

    def state(self) -> dict[str, Any]:
        """All that is remembered, as `PagedMemory.state`."""
        return {
            "memories": [memory.state() for memory in self.memories],
            "counts": list(self.counts),
            "evicted": self.evicted,
            "most": dict(self.most),
        }

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Remember what another bank of the same settings did at its `state`, on a device, and nothing else."""
        self.memories, self.counts = [], []
        for count, memory in zip(state["counts"], state["memories"], strict=True):
            self.add_objects(count)
            self.memories[-1].load_state(memory, device)
        self.evicted, self.most = state["evicted"], dict(state["most"])

    def _parts(self) -> list[slice]:
        starts = np.cumsum([0, *self.counts]).tolist()
        return [slice(start, stop) for start, stop in zip(starts, starts[1:])]

    def _make_room(self, memory: SpaceTimeMemory, frame_index: int) -> None:
        """Evict frames until this one fits into a memory, but not from others that have just taken it in."""
        budget = self.budget
        if budget.device is None:
            return
        while (needed := sum(other.nbytes_with(other is memory) for other in self.memories)) > budget.total:
            candidates = [
                (frame.used / frame.reads if self.budget.eviction == "importance" and frame.reads else frame.index,
                 other, place)
                for other in self.memories
                for place, frame in enumerate(other.frames)
                if not frame.given and frame.index != frame_index
            ]  # fmt: skip
            if not candidates:
                raise ValueError(
                    f"memory budget: expected at least {format_size(needed)} for "
                    f"{sum(self.counts)} objects and the frames that must stay, got {format_size(budget.total)}"
                )
            _, other, place = min(candidates, key=lambda candidate: candidate[0])
            other.evict(place)
            self.evicted += 1
        held = [other.pages for other in self.memories if other.pages is not None]
        for pages in held:
            pages.free_unused()
        for pages in held:
            others = sum(other.device_nbytes for other in held if other is not pages)
            pages.device_pages = max(0, budget.device - others) // pages.page_nbytes
