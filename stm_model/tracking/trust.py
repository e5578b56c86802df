"""How far a found mask can be trusted: how sure the network is, and how well the mask agrees with those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from stm_kernels import memory_read
from stm_model.network import STRIDE, as_positions
from stm_model.tracking.frames import pad_to_stride

UNTRUSTED = 0.4
"""A trust below which an object counts as lost: on held-out videos most masks with a J below 0.5 are such."""
SPACING = 2
"""Of the cells outside the given masks, those in every such row and column are compared, and count for the others."""
DECODED = 4
"""Pixels from one value of the decoder to the next."""
FAINT = 0.02
"""Smaller probabilities are no sign of an object."""


@dataclass
class _Given:
    """Objects whose masks were given in one frame."""

    labels: list[int]
    key: Tensor
    """`[n, P, C]` of the P cells that are compared, or `[1, P, C]` where the objects share it."""
    cells: Tensor
    """`[n, P]`, the share of each cell that each object covers."""
    counts: Tensor
    """`[P]`, how many cells each one stands for."""


class GivenMasks:
    """The last given mask of each object, to be compared with what is found later.

    Args:
        read_options: of `stm_kernels.memory_read`.
    """

    def __init__(self, **read_options: Any) -> None:
        self.read_options = read_options
        self._frames: list[_Given] = []

    def add(self, labels: Sequence[int], key: Tensor, cells: Tensor) -> None:
        """Take in masks `[n, h, w]` of one frame, with the frame's keys `[n, C, h, w]` or `[1, C, h, w]`."""
        for label in labels:
            self.remove(label)
        if labels:
            inside, lattice = cells.amax(0) > 0, torch.zeros_like(cells[0], dtype=torch.bool)
            lattice[::SPACING, ::SPACING] = True
            counts = torch.where(inside, 1.0, SPACING**2)[inside | lattice]
            compared = (inside | lattice).flatten().nonzero()[:, 0]
            self._frames.append(
                _Given(list(labels), as_positions(key)[:, compared], cells.flatten(1)[:, compared], counts)
            )

    def remove(self, label: int) -> None:
        """Forget an object, if there is a mask of it."""
        for given in self._frames:
            if label in given.labels:
                staying = [place for place, other in enumerate(given.labels) if other != label]
                given.labels = [given.labels[place] for place in staying]
                given.cells = given.cells[staying]
                given.key = given.key if len(given.key) == 1 else given.key[staying]
        self._frames = [given for given in self._frames if given.labels]

    def agreement(self, query_key: Tensor, found: Mapping[int, Tensor]) -> dict[int, float]:
        """How much of each given mask is found again by reading the frame from it, as soft J, 0 to 1.

        The frame is the memory, its masks are the values, and the frame of the given mask asks: one step of tracking
        backwards.

        Args:
            query_key: `[1, C, h, w]` of the frame.
            found: label → `[h, w]`, the share of each cell that the object covers in the frame.

        Returns:
            Label → soft J, of the objects that are in `found` and had a mask given.
        """
        agreements: dict[int, float] = {}
        for given in self._frames:
            groups = len(given.key)
            nothing = torch.zeros(query_key.shape[-2:], device=query_key.device)
            value = torch.stack([found.get(label, nothing) for label in given.labels])
            value = rearrange(value, "(g n) h w -> g (h w) n", g=groups).to(query_key.dtype)
            memory_key = as_positions(query_key).expand(groups, -1, -1)
            back = memory_read(given.key, memory_key, value, **self.read_options)
            back = rearrange(back, "g p n -> (g n) p").float()
            agreements |= dict(zip(given.labels, soft_overlap(back, given.cells, given.counts)))
        return {label: value for label, value in agreements.items() if label in found}

    def state(self) -> list[tuple[list[int], Tensor, Tensor, Tensor]]:
        """All it holds."""
        return [(given.labels, given.key, given.cells, given.counts) for given in self._frames]

    def load_state(self, state: Sequence[tuple[list[int], Tensor, Tensor, Tensor]], device: torch.device) -> None:
        """Hold what another one held at its `state`, on a device."""
        self._frames = [_Given(list(labels), *(each.to(device) for each in tensors)) for labels, *tensors in state]


def agreement_of(query_key: Tensor, given: GivenMasks, objects: Sequence[int], old: Tensor, new: Tensor) -> list[float]:
    """How well each object agrees with the masks before: the root of the geometric mean of two soft J, 0 to 1.

    One is with its mask in the previous frame, the other with its last given mask, see `GivenMasks.agreement`; without
    one the first alone counts.

    Args:
        query_key: `[1, C, h, w]` of the frame.
        given: the given masks.
        objects: label of each object.
        old: `[m, h, w]`, the first m objects in the previous frame, see `cells_of`.
        new: `[n, h, w]`, the objects in the frame; one beyond the m agrees.
    """
    still = soft_overlap(new[: len(old)].flatten(1), old.flatten(1))
    back = given.agreement(query_key, dict(zip(objects[: len(old)], new)))
    known = [(value * back.get(label, value)) ** 0.25 for label, value in zip(objects, still)]
    return known + [1.0] * (len(objects) - len(known))


def cells_of(masks: Tensor) -> Tensor:
    """The share `[n, h, w]` of each cell of the network's grid that soft masks `[n, H, W]` cover.

    The decoder's masks have a quarter of the resolution, so of the pixels every fourth row and column tells.
    """
    padded = pad_to_stride(masks.float())[0]
    return F.avg_pool2d(padded[:, DECODED // 2 :: DECODED, DECODED // 2 :: DECODED], STRIDE // DECODED)


def soft_overlap(one: Tensor, other: Tensor, counts: Tensor | float = 1.0) -> list[float]:
    """Soft J of masks `[n, P]` in 0…1 at P cells: the sum of the lesser over that of the greater; 0 where both are
    empty. `counts` `[P]` is how many cells each one stands for.
    """
    union = (torch.maximum(one, other) * counts).sum(1)
    return ((torch.minimum(one, other) * counts).sum(1) / union.clamp_min(1e-6)).tolist()


def certainty_of(probabilities: Tensor, winners: np.ndarray) -> list[float]:
    """The mean of each object's probabilities weighted by themselves, 0 for one that wins no pixel.

    Args:
        probabilities: `[n + 1, h, w]`, background first.
        winners: `[h, w]`, the channel of the largest one of each pixel, see `winners_of`.
    """
    seen = F.threshold(probabilities[1:].float(), FAINT, 0.0)
    means = seen.square().sum((1, 2)) / seen.sum((1, 2)).clamp_min(FAINT)
    return [mean if (winners == channel).any() else 0.0 for channel, mean in enumerate(means.tolist(), 1)]
