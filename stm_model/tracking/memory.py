"""Keys and values of the remembered positions of objects that entered together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from stm_kernels import PagedMemory
from stm_model.network import as_positions
from stm_model.tracking.budget import PAGE_MULTIPLE, MemoryRule, budget_page

USAGE_DECAY = 0.95
"""What a read counts for at the next one: half of it after 14 reads."""
PROBATION = 5
"""For so many frames a position stays, however little it is used: nothing is known of it yet."""
FAR = 0.02
"""What a query counts for that is at no object, where one at an object counts 1."""
BESIDE = 2
"""So many positions from an object every position of a frame is remembered."""
FAINT = 0.05
"""Less of an object at a position is none."""
FRAME, GIVEN, OBJECT, USED, USE, WEIGHT = range(6)
"""Columns of what is noted of a position: the frame that it is of, whether the user gave that frame's mask, the object
that it is at (-1 for none), its share of the mass of each read, decayed and summed, the same not decayed, and how many
positions of its frame it stands for.
"""


class SpaceTimeMemory:
    """Keys and values of remembered positions, for objects that entered the video at one frame.

    A frame is appended without touching what is already held. At most one frame, the newest, is temporary.

    Args:
        rule, objects: which frames are remembered, and n, of how many objects.
        limit: bytes on the device within which positions have to stay, by which pages are measured; None is no limit.
        spacing: the largest of `sparse_places` that a frame is remembered by. Above 1 keys get one channel more, for
            what a position weighs.
        weighed: whether to note how much every position is used.
        read_options: those of `PagedMemory.read`.
    """

    def __init__(
        self,
        rule: MemoryRule,
        objects: int,
        *,
        limit: int | None = None,
        spacing: int = 1,
        weighed: bool = False,
        **read_options: Any,
    ) -> None:
        self.rule, self.objects, self.limit, self.spacing = rule, objects, limit, spacing
        self.weighed, self.read_options = weighed, read_options
        self.pages: PagedMemory | None = None
        self.notes = torch.zeros(0, 6, dtype=torch.float64)
        """`[N, 6]`, a row for every position, in the order in which they lie in memory."""
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

    def nbytes_with(self, more: int) -> int:
        """Bytes held when so many more positions are."""
        if self.pages is None:
            return 0
        return -(-(len(self.notes) + more) // self.pages.page_size) * self.pages.page_nbytes

    def prepare(self, key: Tensor, value: Tensor) -> PagedMemory:
        """The pages, for frames with such keys and values, see `remember`, in their dtype and on their device."""
        if self.pages is None:
            self.positions = key.shape[-2] * key.shape[-1]
            value = _beside(value, len(key))
            channels = key.shape[1] + (self.spacing > 1)
            self.pages = self._make_pages(len(key), channels, value.shape[1], key.dtype, key.device)
        return self.pages

    def _make_pages(
        self, keys: int, key_channels: int, value_channels: int, dtype: torch.dtype, device: torch.device
    ) -> PagedMemory:
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        if self.limit is not None:
            position_bytes = keys * (key_channels + value_channels) * dtype.itemsize
            options["page_size"] = budget_page(self.limit, self.positions, position_bytes)
        return PagedMemory(keys, key_channels, value_channels, **options)

    def remember(
        self,
        frame_index: int,
        given: bool,
        kept: bool,
        key: Tensor,
        value: Tensor,
        cells: Tensor | None = None,
        sparse: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add a frame, a temporary one unless it is `kept`; `given` if the user gave a mask of it.

        Args:
            key: `[n, C, h, w]`, or `[1, C, h, w]` where the n objects share it.
            value: `[n, V, h, w]`.
            cells: `[n, h, w]`, how certainly each object is at each position; None is not known.
            sparse: which positions of a `kept` frame are remembered, and what each weighs, see `sparse_places`; None is
                all of them.
        """
        pages, keys, values = self.prepare(key, value), as_positions(key), as_positions(_beside(value, len(key)))
        places, weights = (None, torch.ones(self.positions)) if sparse is None else sparse
        if places is not None:
            keys, values = keys[:, places], values[:, places]
        if self.spacing > 1:
            keys = torch.cat([keys, self._weighing(weights, key).expand(len(keys), -1, -1)], 2)
        pages.append(keys, values)
        notes = self.notes.new_tensor([frame_index, given, -1, 0, 0, 1]).repeat(keys.shape[1], 1)
        notes[:, WEIGHT] = weights.cpu()
        if cells is not None and self.weighed:
            near, owner = _near(cells).flatten(1).max(0)
            owner = owner.masked_fill(near < 0.5, -1)
            notes[:, OBJECT] = (owner if places is None else owner[places]).cpu().double()
        self.notes = torch.cat([self.notes, notes])
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

    def part(self, objects: Sequence[int]) -> SpaceTimeMemory:
        """The memory of some of its objects alone, with pages of its own."""
        options = {"limit": self.limit, "spacing": self.spacing, "weighed": self.weighed, **self.read_options}
        part = SpaceTimeMemory(self.rule, len(objects), **options)
        state = self.state() | {"objects": len(objects)}
        if state["pages"] is not None:
            assert self.pages is not None
            # values lie side by side under one key, or every object has keys of its own
            sharing = self.objects // self.pages.batch

            def of_part(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
                index = torch.tensor(objects, device=key.device)
                if sharing == 1:
                    return key[index], value[index]
                parts = rearrange(value, "k p (n v) -> k p n v", n=sharing)
                return key, rearrange(parts[:, :, index], "k p n v -> k p (n v)")

            state["pages"] = state["pages"] | {"pages": [of_part(*page) for page in state["pages"]["pages"]]}
        part.load_state(state, self.pages.device if self.pages is not None else torch.device("cpu"))
        # the last one stands for no object
        places = part.notes.new_full((self.objects + 1,), -1)
        places[list(objects)] = torch.arange(len(objects), dtype=places.dtype)
        part.notes[:, OBJECT] = places[part.notes[:, OBJECT].long()]
        return part

    def forget_since(self, frame_index: int) -> None:
        """Drop the frames after one, but for those with a given mask."""
        self.forget_temporary()
        wrong = ((self.notes[:, FRAME] > frame_index) & (self.notes[:, GIVEN] == 0)).nonzero()[:, 0]
        if len(wrong):
            self.evict(wrong)

    def read(self, query_key: Tensor, cells: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What each of the n objects reads at every position of a frame, and how familiar the position is.

        What is read near an object counts as use, and for as much as one is seen. The use of an object's positions
        decays while it is seen, so that they stay until it returns.

        Args:
            query_key: `[1, C, h, w]`.
            cells: `[n, h, w]`, how certainly each object was at each position in the frame before; None is everywhere.

        Returns:
            The readout `[n, V, h, w]`, and the log of the mean exponential similarity `[n, h, w]`.
        """
        assert self.pages is not None
        height, width = query_key.shape[-2:]
        queries = as_positions(query_key).expand(self.pages.batch, -1, -1)
        scale = query_key.shape[1] ** -0.5
        options = {"scale": scale, "return_lse": True, "return_usage": self.weighed, **self.read_options}
        if self.spacing > 1:
            weighing = queries.new_full((*queries.shape[:2], 1), self.read_options["similarity"] == "dot")
            queries = torch.cat([queries, weighing], 2)
        if self.weighed and cells is not None:
            options["usage_weight"] = (_near(cells).amax(0).flatten() + FAR).expand(self.pages.batch, -1)
        readout, lse, *usage = self.pages.read(queries, **options)
        if usage:
            self._note_use(usage[0].double().sum(0).cpu(), cells)
        similarity = lse - math.log(self.notes[:, WEIGHT].sum().item())
        if self.spacing > 1 and self.read_options["similarity"] == "l2":
            similarity += math.log(self.spacing**2)
        sharing = self.objects // self.pages.batch
        return (
            rearrange(readout, "k (h w) (n v) -> (k n) v h w", h=height, w=width, n=sharing),
            repeat(similarity, "k (h w) -> (k n) h w", h=height, w=width, n=sharing),
        )

    def _weighing(self, weights: Tensor, key: Tensor) -> Tensor:
        """The further channel `[1, P, 1]` of keys, by which positions weigh what they do in the softmax.

        A dot product adds its logarithm; of squared distances, which are never negative, one to 0 takes away what a
        position lacks to the heaviest.
        """
        scaled = weights.to(key.device).log() / key.shape[1] ** -0.5
        if self.read_options["similarity"] == "l2":
            scaled = (math.log(self.spacing**2) / key.shape[1] ** -0.5 - scaled).clamp(min=0).sqrt()
        return scaled.to(key.dtype)[None, :, None]

    def _note_use(self, mass: Tensor, cells: Tensor | None) -> None:
        """Add a read's mass `[N]` to the use of the positions."""
        # of the background, which is always seen, the last
        seen = torch.ones(self.objects + 1, dtype=torch.float64)
        if cells is not None:
            seen[:-1] = cells.amax((1, 2)).double().cpu()
        mass *= seen[: self.objects].max() / mass.sum()
        self.notes[:, USED] *= USAGE_DECAY ** seen[self.notes[:, OBJECT].long()]
        self.notes[:, USED] += mass
        self.notes[:, USE] += mass

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


def sparse_places(cells: Tensor, spacing: int) -> tuple[Tensor, Tensor]:
    """The positions of a frame that are worth remembering, and what each weighs: those at and beside objects, and of
    the others, which are much alike, those in every so many rows and columns.

    P is a multiple of `PAGE_MULTIPLE`, if there are so many positions: of other numbers a CPU would compile ever new
    products.

    Args:
        cells: `[n, h, w]`, how certainly each object is at each position.
        spacing: rows and columns from one position to the next where there is no object.

    Returns:
        `[P]`, the positions, and `[P]`, how many each stands for: those of a square of `spacing` share what it holds.
    """
    height, width = cells.shape[1:]
    covered = (cells.amax(0, keepdim=True) > FAINT).float()
    chosen = F.max_pool2d(covered, 2 * BESIDE + 1, 1, BESIDE)[0] > 0
    chosen[::spacing, ::spacing] = True
    count = int(chosen.sum())
    order = chosen.flatten().byte().argsort(descending=True, stable=True)
    places = order[: count + -count % PAGE_MULTIPLE]
    rows, columns = (torch.arange(side, device=cells.device) // spacing for side in (height, width))
    square = (rows[:, None] * width + columns).flatten()
    weights = square.bincount() / square[places].bincount(minlength=int(square.max()) + 1)
    return places, weights[square[places]]


def _near(cells: Tensor) -> Tensor:
    """`[n, h, w]`, the most of each position and those beside it."""
    return F.max_pool2d(cells.float(), 3, 1, 1)


def _beside(value: Tensor, keys: int) -> Tensor:
    """Values `[n, V, h, w]` of objects that share a key side by side, `[keys, n/keys·V, h, w]`."""
    return rearrange(value, "(k n) v h w -> k (n v) h w", k=keys)
