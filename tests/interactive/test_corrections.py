"""Regions that scribbles cross out."""

import numpy as np
import pytest
import torch
from drawing import stroke

from stm_model.interactive.blending import cross_out
from stm_model.interactive.scribbles import NONE
from stm_model.interactive.session import ScribbleSession

LARGE, SMALL = (slice(1, 7), slice(1, 7)), (slice(2, 5), slice(9, 12))


def masks(**regions: tuple) -> torch.Tensor:
    """Probabilities `[3, 8, 14]` of objects 5 and 9, each 0.7 in its regions, of which `b` is the second's."""
    probabilities = torch.zeros(3, 8, 14)
    for name, region in regions.items():
        probabilities[2 if name.startswith("b") else 1][region] = 0.7
    probabilities[0] = 1 - probabilities[1:].sum(0)
    return probabilities


def drawn(**lines: tuple[int, int]) -> np.ndarray:
    """A drawing with a line three pixels long from each point on; `_5` is drawn with 5."""
    drawing = np.full((8, 14), NONE, dtype=np.int8)
    for name, (row, column) in lines.items():
        drawing[row, column : column + 3] = int(name.split("_")[1])
    return drawing


@pytest.mark.parametrize(
    "drawing, gone",
    [
        (drawn(_5=(3, 2), _0=(3, 9)), SMALL),
        (drawn(_5=(3, 9), _0=(3, 2)), LARGE),
        (drawn(_0=(3, 9)), SMALL),
        (drawn(_0=(3, 2)), None),
        (drawn(_5=(3, 2)), None),
        (drawn(_5=(3, 9), _0=(4, 10)), None),
        (drawn(_0=(7, 10)), None),
        (drawn(), None),
    ],
    ids=[
        "own_elsewhere",
        "own_on_the_smaller",
        "a_larger_one",
        "the_largest",
        "own_alone",
        "both",
        "beside",
        "nothing",
    ],
)
def test_a_region_goes_where_another_one_is_the_object(drawing, gone):
    before = masks(a_large=LARGE, a_small=SMALL)
    expected = before.clone()
    if gone:
        expected[0][gone], expected[1][gone] = 1.0, 0.0
    kept = before.clone()
    assert torch.equal(cross_out(before, drawing, (5, 9)), expected)
    assert torch.equal(before, kept), "what was given stays"


def test_the_only_region_of_an_object_stays():
    before = masks(a=LARGE)
    assert torch.equal(cross_out(before, drawn(_0=(3, 2)), (5, 9)), before)


def test_a_region_goes_to_the_object_that_is_drawn_on_it():
    before = masks(a_large=LARGE, a_small=SMALL)
    after = cross_out(before, drawn(_9=(3, 9), _0=(7, 10)), (5, 9))
    torch.testing.assert_close(after[(slice(None), *SMALL)], torch.tensor([0.3, 0, 0.7])[:, None, None].expand(3, 3, 3))
    torch.testing.assert_close(after.sum(0), torch.ones(8, 14))


def test_others_regions_are_their_own():
    before = masks(a=LARGE, b=SMALL)
    assert torch.equal(cross_out(before, drawn(_5=(3, 2), _0=(3, 9)), (5, 9)), before), "the last of object 9"


def test_in_a_session_a_frame_loses_what_is_crossed_out_on_it(scribble_model, clip, monkeypatch):
    session = ScribbleSession(scribble_model, clip[0])
    islands = torch.zeros(2, 70, 90)
    islands[1, 5:40, 5:40] = islands[1, 50:60, 60:80] = 1.0
    islands[0] = 1 - islands[1]
    monkeypatch.setattr(session._segmenter, "segment", lambda memory, asked: ((index, islands) for index in asked))
    session.add_scribbles(2, [stroke(1, (0.2, 0.2), (0.3, 0.3))])
    session.run()
    assert session.labels(2)[55, 70] == 1
    session.add_scribbles(2, [stroke(0, (0.7, 0.78), (0.8, 0.78))])
    assert session.preview(2)[55, 70] == 0
    session.run()
    assert [session.labels(index)[55, 70] for index in (2, 3)] == [0, 1]
    assert session.labels(2)[20, 20] == 1
