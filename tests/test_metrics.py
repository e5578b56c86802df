"""J and F against what the official DAVIS 2017 evaluation gives, and against masks whose score is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from stm_model.evaluation.metrics import contour_accuracy, region_similarity, sequence_scores

VECTORS = Path(__file__).parents[2] / "shared" / "data" / "evaluation_vectors"


@pytest.mark.skipif(not VECTORS.is_dir(), reason="evaluation_vectors are not here")
def test_both_measures_equal_the_official_evaluation():
    pairs = json.loads((VECTORS / "vectors.json").read_text())["pairs"]
    packed = np.load(VECTORS / "vectors.npz")
    assert len(pairs) == 15
    for pair in pairs:
        masks = []
        for name in ("pred", "gt", "void"):
            bits = packed.get(f"{pair['i']}_{name}")
            count = np.prod(pair["shape"])
            masks.append(None if bits is None else np.unpackbits(bits, count=count).reshape(pair["shape"]).astype(bool))
        assert region_similarity(*masks) == pytest.approx(pair["J"], abs=1e-9, rel=0), pair["name"]
        assert contour_accuracy(*masks) == pytest.approx(pair["F"], abs=1e-9, rel=0), pair["name"]


def _box(top, bottom, left, right, shape=(60, 80)):
    mask = np.zeros(shape, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def test_known_scores():
    mask, empty = _box(10, 30, 10, 50), _box(0, 0, 0, 0)
    assert region_similarity(mask, mask) == contour_accuracy(mask, mask) == 1.0
    assert region_similarity(empty, empty) == contour_accuracy(empty, empty) == 1.0
    assert region_similarity(mask, empty) == contour_accuracy(mask, empty) == 0.0
    assert region_similarity(empty, mask) == contour_accuracy(empty, mask) == 0.0
    assert region_similarity(mask, _box(10, 30, 30, 70)) == pytest.approx(1 / 3)
    # the diagonal is 100 px, so a contour may be off by one pixel and no more
    assert contour_accuracy(mask, _box(11, 31, 10, 50)) == 1.0
    assert contour_accuracy(mask, _box(12, 32, 10, 50)) < 1.0


def test_a_mask_that_fills_the_picture_has_no_contour():
    full = _box(0, 60, 0, 80)
    assert contour_accuracy(full, full) == 1.0
    assert contour_accuracy(full, _box(10, 30, 10, 50)) == 0.0


def test_void_pixels_count_for_neither_mask():
    truth, void = _box(10, 30, 10, 50), _box(0, 60, 50, 80)
    spilled = truth | _box(10, 30, 50, 70)
    assert region_similarity(spilled, truth) < 1.0 and contour_accuracy(spilled, truth) < 1.0
    assert region_similarity(spilled, truth, void) == contour_accuracy(spilled, truth, void) == 1.0


@pytest.mark.parametrize("measure", [region_similarity, contour_accuracy])
def test_wrong_masks_are_named(measure):
    mask = _box(10, 30, 10, 50)
    with pytest.raises(ValueError, match=r"prediction: expected a bool mask \[H, W\], got uint8"):
        measure(mask.astype(np.uint8), mask)
    with pytest.raises(ValueError, match=r"prediction: expected the truth's shape \[60, 80\], got \[59, 80\]"):
        measure(mask[1:], mask)
    with pytest.raises(ValueError, match="void: expected the truth's shape"):
        measure(mask, mask, mask[:, 1:])


def test_a_sequence_is_scored_by_object_without_its_ends():
    first, second = _box(10, 30, 10, 50), _box(40, 50, 10, 50)
    truth = (first * 3 + second * 7).astype(np.uint8)
    truth[:, 79] = 255
    only_first = (first * 3).astype(np.uint8)
    nothing = np.zeros_like(truth)
    scores = sequence_scores([nothing, truth, only_first, nothing], [truth] * 4)
    assert scores == {3: (1.0, 1.0), 7: (0.5, 0.5)}
    everything = sequence_scores([nothing, truth, only_first, nothing], [truth] * 4, skip_ends=False)
    assert everything == {3: (0.5, 0.5), 7: (0.25, 0.25)}
    assert sequence_scores([truth] * 3, [truth] * 3, objects=[7]) == {7: (1.0, 1.0)}


def test_a_sequence_that_cannot_be_scored_is_refused():
    truth = _box(10, 30, 10, 50).astype(np.uint8)
    with pytest.raises(ValueError, match="got 2 and 3"):
        sequence_scores([truth] * 2, [truth] * 3)
    with pytest.raises(ValueError, match="at least 3 frames, got 2"):
        sequence_scores([truth] * 2, [truth] * 2)
    with pytest.raises(ValueError, match="at least one label"):
        sequence_scores([truth * 0] * 3, [truth * 0] * 3)
