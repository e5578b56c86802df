"""Objects are held back where they cannot be and another one can."""

from dataclasses import replace

import pytest
import torch

from stm_model import STM, STMConfig, Tracker
from stm_model.network import STRIDE
from stm_model.tracking.reach import OUT_OF_REACH, hold_back

CELLS = (20, 40)
"""Of the grid: the reach is two cells."""


def cells_at(*places: tuple[slice, slice]) -> torch.Tensor:
    """Cells `[n, h, w]` with a probability of 0.9 in one place for each object, 0.1 elsewhere."""
    cells = torch.full((len(places), *CELLS), 0.1)
    for cell, place in zip(cells, places):
        cell[place] = 0.9
    return cells


def both(left: float, right: float, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of `count` objects, the same on the left half and on the right; and their cells."""
    found = torch.full((count, *CELLS), left)
    found[..., CELLS[1] // 2 :] = right
    return found.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2), found


LEFT, RIGHT, NOWHERE = (slice(5, 15), slice(2, 8)), (slice(5, 15), slice(30, 38)), (slice(0, 0), slice(0, 0))


def centers(maps: torch.Tensor) -> torch.Tensor:
    """The pixel in the middle of each cell."""
    return maps[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]


def test_an_object_is_held_back_where_another_is_expected_and_only_there():
    objects, found = both(0.8, 0.6)
    held = centers(hold_back(objects, found, cells_at(LEFT, RIGHT)))
    odds = torch.tensor([4.0, 1.5]) * OUT_OF_REACH
    there, here = odds / (1 + odds)
    # the first on the second's place, and the second on the first's; the reach of two cells is bilinear at its rim
    torch.testing.assert_close(held[0, 5:15, 31:37], here.expand(10, 6))
    torch.testing.assert_close(held[1, 5:15, 3:7], there.expand(10, 4))
    for place, (own, value) in enumerate([(LEFT, 0.8), (RIGHT, 0.6)]):
        torch.testing.assert_close(held[place][own], torch.full_like(held[place][own], value))
    # where neither is expected, both may be
    assert (held[:, :, 12:19] == 0.8).all() and (held[:, 18:] == both(0.8, 0.6)[1][:, 18:]).all()


def test_within_its_reach_an_object_is_not_held_back():
    objects, found = both(0.8, 0.8)
    near = (slice(5, 15), slice(8, 10)), (slice(5, 15), slice(11, 13))
    held = centers(hold_back(objects, found, cells_at(*near)))
    # two cells on either side of where it was; the last one's edge is softened
    assert (held[0, 5:15, 6:12] > 0.79).all() and (held[0, 5:15, 13:15] < 0.4).all()


@pytest.mark.parametrize("places", [(LEFT,), (LEFT, LEFT), (LEFT, NOWHERE), (NOWHERE, NOWHERE)])
def test_one_that_is_alone_or_was_nowhere_is_left_as_it_is(places):
    objects, found = both(0.8, 0.6, len(places))
    held = hold_back(objects, found, cells_at(*places))
    for place, where in enumerate(places):
        if where is NOWHERE or len(set(map(str, places))) == 1:
            assert torch.equal(held[place], objects[place])
    if places == (LEFT, NOWHERE):
        # one that is nowhere has no reach that would hold the other back
        assert held is objects


def test_nothing_out_of_reach_costs_nothing():
    objects, found = both(0.8, 0.0)
    found[1] = 0.005
    assert hold_back(objects, found, cells_at(LEFT, RIGHT)) is objects


@pytest.mark.parametrize("prior", [True, False])
def test_a_network_that_does_not_see_the_previous_masks_is_left_alone(clip, monkeypatch, prior):
    calls = []

    def nothing_is_left(objects, found, previous):
        calls.append(previous.shape)
        return objects * 0

    monkeypatch.setattr("stm_model.tracking.session.hold_back", nothing_is_left)
    torch.manual_seed(0)
    config = replace(STMConfig.shared(), key_channels=16, value_channels=32, decoder_channels=32, prior=prior)
    frames, labels = clip
    found = [*Tracker(STM(config).eval()).track(frames[:3], {0: labels[0]})]
    assert len(calls) == (2 if prior else 0)
    assert all(result.labels.any() != prior for result in found[1:])
