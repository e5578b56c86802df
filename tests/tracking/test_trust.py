"""How well found masks agree with the masks before them, and what the tracker trusts."""

import numpy as np
import pytest
import torch

from stm_model import Tracker
from stm_model.tracking import trust
from stm_model.tracking.trust import GivenMasks, agreement_of, cells_of, certainty_of, soft_overlap

GENERATOR = torch.Generator().manual_seed(0)
KEY = 8 * torch.randn(1, 16, 4, 4, generator=GENERATOR)
"""Cells so unlike each other that each one reads itself."""
CELLS = torch.zeros(2, 4, 4)
CELLS[0, :2], CELLS[1, 2, :3] = 1, 1


def given_masks(key=KEY, labels=(3, 5), cells=CELLS):
    given = GivenMasks(similarity="l2")
    given.add(list(labels), key, cells)
    return given


def test_overlap_is_soft_j():
    one, other = torch.tensor([[0.5, 1.0]]), torch.tensor([[1.0, 0.25]])
    assert soft_overlap(one, other) == pytest.approx([0.75 / 2.0])
    assert soft_overlap(one, other, torch.tensor([4.0, 1.0])) == pytest.approx([2.25 / 5.0])
    assert soft_overlap(torch.zeros(1, 4), torch.zeros(1, 4)) == [0.0]


def test_a_cell_is_the_mean_of_the_pixels_under_it():
    # as the decoder's masks are, enlarged; 854 pixels are padded by 5 on either side
    masks = torch.nn.functional.interpolate(torch.rand(2, 1, 30, 56, generator=GENERATOR), (120, 224), mode="bilinear")
    masks = masks[:, 0, :, 5:-5]
    whole = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(masks, (5, 5, 4, 4)), 16)
    # a sample is an eighth of a step off the middle of its 4 pixels: 1/32 of what changes across a cell, along either
    # axis; and at the edge one of 4 columns of samples counts a column of padding
    torch.testing.assert_close(cells_of(masks), whole, atol=2 / 32 + 1 / 16, rtol=0)


def test_cells_outside_the_given_masks_are_counted_by_some_of_them(monkeypatch):
    key, cells = 8 * torch.randn(1, 16, 8, 12, generator=GENERATOR), torch.zeros(2, 8, 12)
    cells[0, 2:4, 2:6], cells[1, 4:, 6:] = 1, 0.5
    # every two rows and columns are alike, so that some cells say what all do
    found = {1: cells[0] * 0.5 + 0.25, 2: cells[1]}
    some = given_masks(key, (1, 2), cells)
    ((_, keys, _, counts),) = some.state()
    # 32 cells of the masks, and of the other 64 those of every second row and column
    assert keys.shape == (1, 48, 16) and counts.tolist().count(1) == 32 and counts.tolist().count(4) == 16
    monkeypatch.setattr(trust, "SPACING", 1)
    every = given_masks(key, (1, 2), cells)
    assert every.state()[0][1].shape == (1, 96, 16)
    assert some.agreement(key, found) == pytest.approx(every.agreement(key, found), abs=1e-4)


@pytest.mark.parametrize("keys", [1, 2])
def test_the_same_masks_agree_with_those_given_wherever_they_moved(keys):
    given = given_masks(KEY.expand(keys, -1, -1, -1))
    moved = [torch.roll(maps, (1, 2), (-2, -1)) for maps in (KEY, CELLS)]
    assert given.agreement(moved[0], {3: moved[1][0], 5: moved[1][1]}) == pytest.approx({3: 1.0, 5: 1.0}, abs=1e-4)


@pytest.mark.parametrize("keys", [1, 2])
def test_a_mask_on_another_object_disagrees(keys):
    found = given_masks(KEY.expand(keys, -1, -1, -1)).agreement(KEY, {3: CELLS[1], 5: CELLS[1]})
    assert found == pytest.approx({3: 0.0, 5: 1.0}, abs=1e-4)


def test_what_is_not_found_now_is_not_compared():
    assert given_masks().agreement(KEY, {5: CELLS[1], 7: CELLS[0]}).keys() == {5}


def test_the_last_given_mask_counts_until_the_object_is_removed():
    given = given_masks()
    given.add([3], KEY, CELLS[1:])
    assert given.agreement(KEY, {3: CELLS[0], 5: CELLS[1]}) == pytest.approx({3: 0.0, 5: 1.0}, abs=1e-4)
    assert sorted(label for labels, *_ in given.state() for label in labels) == [3, 5]
    given.remove(3)
    assert given.agreement(KEY, {3: CELLS[0], 5: CELLS[1]}).keys() == {5}
    again = GivenMasks(similarity="l2")
    again.load_state(given.state(), torch.device("cpu"))
    soft = {5: torch.rand(4, 4, generator=GENERATOR)}
    assert again.agreement(KEY, soft) == given.agreement(KEY, soft)


def test_agreement_is_the_root_of_the_geometric_mean_of_both():
    before, now = torch.zeros(3, 64, 64), torch.zeros(4, 64, 64)
    # half of what is found was there before; with the given mask it agrees whole
    before[1, :16], now[1, :32] = 1, 1
    # the second has no given mask; the third was not there before
    before[2, 48:], now[2, 48:, :32], now[3, 40:48] = 1, 1, 1
    assert torch.equal(cells_of(now[1:2])[0], CELLS[0])
    cells = cells_of(before[1:]), cells_of(now[1:])
    found = agreement_of(KEY, given_masks(labels=[3], cells=CELLS[:1]), [3, 8, 9], *cells)
    assert found == pytest.approx([0.5**0.25, 0.5**0.5, 1.0], abs=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_trust_is_certainty_times_agreement_and_a_given_mask_is_trusted(small_model, shared_model, clip, shared):
    frames, labels = clip
    session = Tracker(shared_model if shared else small_model).start({0: np.where(labels[0] == 1, 1, 0)})
    assert session.step(frames[0]).trust == (1.0,)
    found = session.step(frames[1])
    assert 0 < found.trust[0] < found.certainty[0]
    assert session.correct(labels[1]).trust == (1.0, 1.0)
    for frame in frames[2:4]:
        found = session.step(frame)
        assert all(0 < trust < certainty for trust, certainty in zip(found.trust, found.certainty, strict=True))
    staying = session.previous.agreement[1:]
    left = session.remove(1)
    assert left.trust == (left.certainty[0] * staying[0],)


def test_an_object_that_wins_no_pixel_is_not_certain():
    probabilities = torch.tensor([[1.0, 0.0, 0.4], [0.0, 0.8, 0.4], [0.0, 0.2, 0.2]])[:, None]
    # by themselves: (0.8² + 0.4²) / (0.8 + 0.4); the second is beaten everywhere
    assert certainty_of(probabilities, np.array([[0, 1, 1]])) == pytest.approx([0.8 / 1.2, 0.0])
