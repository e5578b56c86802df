"""Scribbles against the interactive challenge's own drawings, thinning against a published one, broken files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from stm_model.interactive.scribbles import (
    ScribbleError,
    bezier,
    polyline,
    rasterize,
    read_scribbles,
    scribble_maps,
    thin,
)
from stm_model.interactive.synthesis import corrective, synthesize, synthesize_background

VECTORS = Path(__file__).parents[1] / "data" / "scribble_vectors"

masks = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**31), st.floats(0.2, 0.95))


def _blobs(shape):
    """Random blobs, of any number of pieces, with holes and at the picture's sides."""
    height, width, seed, share = shape
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(height, width)), 1.2)
    return noise < np.quantile(noise, share)


def _pieces(mask):
    return ndimage.label(mask, np.ones((3, 3)))[1]


@pytest.mark.parametrize("name", ["bear/001", "bear/002", "tennis/001"])
@pytest.mark.parametrize("size", [(480, 854), (96, 160)])
@pytest.mark.parametrize("smooth", [False, True])
def test_drawings_equal_the_challenge(name, size, smooth):
    (scribbles,) = read_scribbles(VECTORS / "human" / f"{name}.json").values()
    expected = np.load(VECTORS / "vectors.npz")[f"{name}|{size[0]}x{size[1]}|bezier{int(smooth)}"]
    drawn = rasterize(scribbles, size, smooth)
    assert drawn.dtype == np.int8
    np.testing.assert_array_equal(drawn, expected)


def test_curves_equal_the_challenge():
    vectors = np.load(Path(__file__).parents[1] / "data" / "scribble_curves.npz")
    points = vectors["control_points"]
    np.testing.assert_allclose(bezier(points, 50), vectors["curve"], rtol=0, atol=1e-13)
    line = polyline(points.astype(np.int64))
    assert {*map(tuple, line.tolist())} == {*map(tuple, vectors["line"].tolist())}


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=2, max_size=5))
def test_lines_are_the_pixels_nearest_to_them(points):
    line = polyline(np.array(points))
    assert tuple(line[0]) == points[0] and tuple(line[-1]) == points[-1]
    # one pixel after the other, as many as the longer side of each piece
    steps = [max(abs(np.subtract(end, start))) for start, end in zip(points, points[1:])]
    assert len(line) == 1 + sum(steps) and (abs(np.diff(line, axis=0)).max(1, initial=0) <= 1).all()
    place = 0
    for (start, end), count in zip(zip(points, points[1:]), steps):
        for step in range(count + 1):
            exact = np.add(start, np.subtract(end, start) * (step / max(count, 1)))
            # halves are rounded away from the start
            assert abs(line[place + step] - exact).max() <= 0.5
            away = np.sign(np.subtract(end, start)) * (line[place + step] - exact)
            assert (away > -0.5).all()
        place += count


def test_thinning_equals_the_published_one():
    vectors = np.load(VECTORS / "thinning.npz")
    skeleton = thin(vectors["davis_camel_00045_mask"] > 0)
    np.testing.assert_array_equal(skeleton, vectors["davis_camel_00045_cv2_guohall"] > 0)


def _thinned(mask):
    """Guo and Hall's algorithm pixel by pixel, from the paper's definition."""
    mask, first, unchanged = np.pad(mask, 1), True, 0
    clockwise = [(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)]
    while unchanged < 2:
        removed = []
        for row, column in np.argwhere(mask):
            p2, p3, p4, p5, p6, p7, p8, p9 = (bool(mask[row + y, column + x]) for y, x in clockwise)
            c = (not p2 and (p3 or p4)) + (not p4 and (p5 or p6)) + (not p6 and (p7 or p8)) + (not p8 and (p9 or p2))
            n1 = (p9 or p2) + (p3 or p4) + (p5 or p6) + (p7 or p8)
            n2 = (p2 or p3) + (p4 or p5) + (p6 or p7) + (p8 or p9)
            third = ((p6 or p7 or not p9) and p8) if first else ((p2 or p3 or not p5) and p4)
            if c == 1 and 2 <= min(n1, n2) <= 3 and not third:
                removed.append((row, column))
        for place in removed:
            mask[place] = False
        unchanged = 0 if removed else unchanged + 1
        first = not first
    return mask[1:-1, 1:-1]


@given(masks)
def test_thinning_equals_the_paper(shape):
    mask = _blobs(shape)
    np.testing.assert_array_equal(thin(mask), _thinned(mask))


@given(masks)
def test_thinning_keeps_pieces_and_is_done_once(shape):
    mask = _blobs(shape)
    skeleton = thin(mask)
    assert not (skeleton & ~mask).any()
    assert _pieces(skeleton) == _pieces(mask)
    np.testing.assert_array_equal(thin(skeleton), skeleton)


def test_thinning_does_not_join_the_sides_of_the_picture():
    mask = np.zeros((9, 7), bool)
    mask[:, [0, 6]] = True
    np.testing.assert_array_equal(thin(mask), mask)


def test_thinning_refuses_labels():
    with pytest.raises(ValueError, match=r"expected a bool mask \[H, W\], got uint8 \[4, 4\]"):
        thin(np.zeros((4, 4), np.uint8))


@given(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 29)), min_size=2, max_size=8), st.data())
def test_a_path_may_be_split(points, data):
    # exactly the pixels' corners: rounding down a quotient and a product may differ otherwise
    path = [[(column + 0.5) / 39.999, (row + 0.5) / 29.999] for column, row in points]
    path = [[min(x, 1.0), min(y, 1.0)] for x, y in path]
    at = data.draw(st.integers(0, len(path) - 1))
    parts = [{"path": path[: at + 1], "object_id": 3}, {"path": path[at:], "object_id": 3}]
    whole = rasterize([{"path": path, "object_id": 3}], (31, 41))
    np.testing.assert_array_equal(rasterize(parts, (31, 41)), whole)
    assert (whole == 3).any() and set(np.unique(whole)) <= {-1, 3}


def test_later_scribbles_are_on_top_and_corners_are_in_the_picture():
    across = [[0, 0], [1, 1]]
    drawn = rasterize([{"path": across, "object_id": 1}, {"path": [[1, 1]], "object_id": 0}], (5, 5))
    np.testing.assert_array_equal(np.diag(drawn), [1, 1, 1, 1, 0])
    assert (drawn >= 0).sum() == 5
    assert (rasterize([], (3, 4)) == -1).all()


def test_points_are_rounded_down_to_pixels():
    assert np.argwhere(rasterize([{"path": [[0.99, 0.6]], "object_id": 1}], (4, 3)) == 1).tolist() == [[1, 1]]


def test_smooth_scribbles_are_bezier_curves():
    path = [[0.05, 0.9], [0.2, 0.1], [0.9, 0.3], [0.6, 0.95]]
    drawn = rasterize([{"path": path, "object_id": 1}], (96, 160), smooth=True)
    columns, rows = polyline(np.floor(bezier(np.array(path), 1000) * (159, 95)).astype(int)).T
    expected = np.full((96, 160), -1)
    expected[rows, columns] = 1
    np.testing.assert_array_equal(drawn, expected)


def test_a_long_path_makes_a_curve():
    path = np.stack([np.linspace(0, 1, 3000), np.linspace(1, 0, 3000)], 1)
    curve = bezier(path, 11)
    np.testing.assert_allclose(curve, np.stack([np.linspace(1, 0, 11), np.linspace(0, 1, 11)], 1), atol=1e-9)


def test_all_others_are_negative():
    drawing = np.full((9, 20), -1, np.int8)
    drawing[4, 3], drawing[4, 10], drawing[4, 16] = 1, 2, 0
    positive, negative = scribble_maps(drawing, [1, 2, 3])
    assert positive.dtype == negative.dtype == np.float32 and positive.shape == negative.shape == (3, 9, 20)
    cross = {(row, column) for row in range(9) for column in range(20) if abs(row - 4) + abs(column - 3) <= 2}
    assert {*zip(*map(np.ndarray.tolist, np.nonzero(positive[0])))} == cross
    assert negative[0, 4, 10] == negative[0, 4, 16] == 1 and negative[0, 4, 3] == 0
    assert not positive[2].any() and negative[2].sum() == positive[0].sum() + positive[1].sum() + 13
    empty = scribble_maps(drawing, [])
    assert empty[0].shape == (0, 9, 20)


def test_a_file_gives_the_frames_with_scribbles(tmp_path):
    frames = {2: [{"path": [[0.1, 0.25], [1, 0]], "object_id": 1, "start_time": 5, "end_time": 90}]}
    content = {"sequence": "bear", "scribbles": [[], [], frames[2], []]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert read_scribbles(tmp_path / "a.json", 4, [1]) == frames


POINT = {"path": [[0.5, 0.5]], "object_id": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "broken JSON"),
        ("[]", 'expected {"sequence": name'),
        ('{"scribbles": [{}]}', 'expected {"sequence": name'),
        ([[], [], [POINT]], "scribbles on frame 2, but the video has 2 frames"),
        ([[], [POINT | {"object_id": 7}]], "frame 1, scribble 0: object 7 is unknown; expected one of 0, 1, 2"),
        ([[POINT | {"object_id": -1}]], "object_id: expected a whole number from 0 to 127, got -1"),
        ([[POINT | {"object_id": "1"}]], "expected a whole number from 0 to 127, got '1'"),
        ([[POINT | {"object_id": True}]], "expected a whole number from 0 to 127, got True"),
        ([[POINT, {"path": [[0, 0]]}]], "frame 0, scribble 1: expected"),
        ([["x"]], "frame 0, scribble 0: expected"),
        ([[POINT | {"path": [[0.5, 0.5], [1.01, 0.5]]}]], "the point [1.01, 0.5] is outside the frame"),
        ([[POINT | {"path": [[0.5, float("nan")]]}]], "the point [0.5, nan] is outside the frame"),
        ([[POINT | {"path": []}]], "path: expected a list of at least one point"),
        ([[POINT | {"path": [[0.1, 0.2], [0.3]]}]], "path: expected a list of at least one point"),
        ([[POINT | {"path": None}]], "path: expected a list of at least one point"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_text(content if isinstance(content, str) else json.dumps({"sequence": "a", "scribbles": content}))
    with pytest.raises(ScribbleError) as caught:
        read_scribbles(path, 2, [1, 2])
    assert str(path) in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)


@given(masks)
def test_made_up_scribbles_lie_in_their_region(shape):
    mask = _blobs(shape)
    random = torch.Generator().manual_seed(shape[2])
    scribble = synthesize(mask, random)
    assert scribble.any() == mask.any() and not (scribble & ~mask).any()
    background = synthesize_background(mask, random)
    assert background.any() == (not mask.all()) and not (background & mask).any()


def test_made_up_scribbles_follow_the_seed():
    mask = _blobs((64, 96, 3, 0.6))
    first, again, other = (synthesize(mask, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_corrections_lie_where_the_prediction_is_wrong():
    truth = np.zeros((60, 80), np.uint8)
    truth[10:50, 10:40] = 1
    truth[10:50, 50:70] = 2
    prediction = np.zeros_like(truth)
    prediction[10:50, 20:60] = 1
    # the middle of what is too much is void
    truth[:, 44:56] = 255
    positive, negative = corrective(prediction, truth, 1, torch.Generator().manual_seed(0))
    assert positive.any() and (truth[positive] == 1).all() and (prediction[positive] != 1).all()
    assert negative.any() and np.isin(truth[negative], (0, 2)).all() and (prediction[negative] == 1).all()
    # an error of ten pixels' width is scribbled in its middle, not on its border
    assert np.nonzero(positive)[1].min() > 10 and np.nonzero(positive)[1].max() < 19
    for scribble in corrective(truth, truth, 1, torch.Generator()):
        assert not scribble.any()
