"""The robot against scribbles that the challenge's own robot drew, and by what its scribbles must be."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from stm_model.interactive import robot
from stm_model.interactive.robot import first_frame, medial_axis, robot_scribbles
from stm_model.interactive.scribbles import bezier, check_scribbles, rasterize

VECTORS = Path(__file__).parents[1] / "data" / "scribble_vectors"
SIZE = np.array([854, 480])
CORNERS = np.ones((3, 3))


@pytest.fixture(scope="module")
def dog():
    """Labels, prediction and skeletons of a frame, and the strokes drawn there: every 25th point, in pixels."""
    arrays = np.load(VECTORS / "vectors.npz")
    strokes = json.loads((VECTORS / "vectors.json").read_text())["robot"]["dog/5"]
    strokes = [(stroke["object_id"], np.array(stroke["path"]) * SIZE) for stroke in strokes]
    named = {name: arrays[f"robot|dog/5|{name}"] for name in ("gt", "pred", "skel0", "skel1")}
    return named, strokes


def test_a_skeleton_is_drawn_as_the_challenge_draws_it(dog):
    arrays, strokes = dog
    drawn = []
    for label in (0, 1):
        pieces, count = ndimage.label(arrays[f"skel{label}"], CORNERS)
        for piece in range(1, count + 1):
            path = robot._longest_path(np.argwhere(pieces == piece))[:, ::-1].astype(float)
            drawn.append((label, [bezier(way, 1000)[::25] for way in (path, path[::-1])]))
    assert [label for label, _ in drawn] == [label for label, _ in strokes]
    for (_, ways), (_, theirs) in zip(drawn, strokes):
        # a path has two directions, and of neighbours that are equally far either may be its end
        assert min(np.abs(way - theirs).max() for way in ways) <= 1 + 1e-3


def test_errors_are_scribbled_where_the_challenge_scribbles(dog):
    arrays, strokes = dog
    scribbles = robot_scribbles(arrays["pred"], arrays["gt"], [1])
    check_scribbles(scribbles, [1])
    for label, theirs in strokes:
        ours = np.concatenate(
            [np.array(scribble["path"]) * SIZE for scribble in scribbles if scribble["object_id"] == label]
        )
        distance = np.linalg.norm(theirs[:, None] - ours, axis=-1).min(1)
        # their medial axis breaks ties by chance: into which corners a stroke runs differs, the middle does not
        assert np.median(distance) < 1
    drawn = rasterize(scribbles, arrays["gt"].shape)
    seen = drawn >= 0
    assert (arrays["gt"][seen] == drawn[seen]).mean() > 0.95 and (arrays["pred"][seen] != drawn[seen]).mean() > 0.95


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31), st.floats(0.3, 0.95))
def test_a_medial_axis_has_the_pieces_of_its_mask(height, width, seed, share):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(height, width)), 1.2)
    mask = noise < np.quantile(noise, share)
    axis = medial_axis(mask)
    assert not (axis & ~mask).any()
    assert ndimage.label(axis, CORNERS)[1] == ndimage.label(mask, CORNERS)[1]
    # holes stay too
    assert (
        ndimage.label(np.pad(~axis, 1, constant_values=True))[1]
        == ndimage.label(np.pad(~mask, 1, constant_values=True))[1]
    )
    np.testing.assert_array_equal(medial_axis(axis), axis)


def test_the_medial_axis_of_a_rectangle_reaches_its_corners():
    axis = medial_axis(np.ones((21, 41), bool))
    assert axis[10, 10:31].all()
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert axis[row, column]
    # its middle line and four diagonals, no more
    assert axis.sum() <= 21 + 4 * 11


def test_the_longest_path_of_a_skeleton_leaves_its_short_arm_out():
    # the first pixel in reading order is the end of the short arm
    arm, line = [(row, 12) for row in range(3)], [(3, column) for column in range(30)]
    path = robot._longest_path(np.array([*arm, *line]))
    assert len(path) == 30 and {tuple(path[0]), tuple(path[-1])} == {line[0], line[-1]}


def test_a_stroke_runs_through_the_middle_of_what_is_missing():
    truth = np.zeros((60, 100), np.uint8)
    truth[20:41, 10:90] = 1
    (scribble,) = robot_scribbles(np.zeros_like(truth), truth, [1])
    columns, rows = (np.array(scribble["path"]) * (100, 60)).T
    assert scribble["object_id"] == 1 and columns.max() - columns.min() > 60
    middle = (columns > 30) & (columns < 70)
    assert np.abs(rows[middle] - 30).max() < 1
    again = robot_scribbles(np.zeros_like(truth), truth, [1])
    assert again == [scribble]


def test_what_is_too_much_is_scribbled_as_what_is_there():
    truth = np.zeros((60, 100), np.uint8)
    truth[:, 60:] = 2
    prediction = np.full_like(truth, 1)
    assert [scribble["object_id"] for scribble in robot_scribbles(prediction, truth, [1, 2])] == [0, 2]
    # of objects that nobody asks for nothing is said
    assert [scribble["object_id"] for scribble in robot_scribbles(prediction, truth, [1])] == [0]
    truth[:, :60] = 255
    assert [scribble["object_id"] for scribble in robot_scribbles(prediction, truth, [1, 2])] == [2]


def test_a_perfect_segmentation_gets_no_scribble():
    truth = np.random.default_rng(0).integers(0, 3, (30, 40)).astype(np.uint8)
    assert robot_scribbles(truth, truth, [1, 2]) == []


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"prediction: expected labels \[4, 5\] like the truth, got \[4, 4\]"):
        robot_scribbles(np.zeros((4, 4)), np.zeros((4, 5)), [1])


def test_a_person_begins_where_all_objects_are_seen_well():
    truths = np.zeros((4, 10, 10), np.uint8)
    truths[0, :8] = 1
    truths[1, 0], truths[1, 1] = 1, 2
    truths[2, :3], truths[2, 4] = 1, 2
    truths[3, :3], truths[3, 5] = 1, 2
    assert first_frame(truths, [1, 2]) == 2
    assert first_frame(truths, [1]) == 0
