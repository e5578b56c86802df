"""The demo's clip: fish that cross, exactly labelled."""

import numpy as np
import pytest

from stm_model.data.aquarium import aquarium_clip


def test_two_fish_cross_and_one_passes_behind_the_other():
    frames, labels = aquarium_clip(frames=48, size=(60, 108))
    assert frames.shape == (48, 60, 108, 3) and frames.dtype == labels.dtype == np.uint8
    areas = np.stack([(labels == label).sum((1, 2)) for label in (1, 2)])
    centers = np.stack([[np.nonzero(mask == label)[1].mean() for mask in labels] for label in (1, 2)])
    assert centers[0, 0] < centers[1, 0] and centers[0, -1] > centers[1, -1]
    # the first is never hidden, the second in part, and never as a whole
    assert areas[0].min() > 0.9 * areas[0].max()
    assert 0.3 * areas[1].max() < areas[1].min() < 0.7 * areas[1].max()
    # the background moves
    still = (labels[0] == 0) & (labels[8] == 0)
    assert np.abs(frames[0][still].astype(int) - frames[8][still]).mean() > 5


def test_a_clip_is_a_function_of_its_seed():
    first, again, other = (aquarium_clip(frames=3, size=(48, 80), seed=seed) for seed in (1, 1, 2))
    for one, two in zip(first, again):
        np.testing.assert_array_equal(one, two)
    assert (first[0] != other[0]).any() and (first[1] != other[1]).any()


@pytest.mark.parametrize("objects", [1, 3, 20])
def test_every_fish_is_seen_at_first(objects):
    labels = aquarium_clip(frames=3, size=(240, 432), objects=objects)[1]
    assert set(np.unique(labels[0])) == set(range(objects + 1))


def test_the_beginning_of_a_clip_does_not_depend_on_its_length():
    short, long = (aquarium_clip(frames=frames, size=(48, 80))[1] for frames in (3, 9))
    np.testing.assert_array_equal(short, long[:3])
