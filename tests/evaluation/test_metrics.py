"""J and F against what the official DAVIS 2017 evaluation gives, and against masks whose score is known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from stm_model.evaluation.metrics import contour_accuracy, region_similarity, sequence_scores, statistics

VECTORS = Path(__file__).parents[1] / "data" / "evaluation_vectors"


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


def test_mean_recall_and_decay_equal_the_official_evaluation():
    rows = json.loads((VECTORS / "vectors.json").read_text())["stats"]
    assert rows
    for row in rows:
        assert statistics(row["values"]) == pytest.approx((row["M"], row["R"], row["D"]), abs=1e-9, rel=0)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 78, 254, 255, 256, 300, 70_000])
def test_statistics_of_a_falling_score_of_any_length(count):
    """Beyond 255 frames the official evaluation counts its quarters with 8 bits."""
    values = np.linspace(1, 0, count) ** 2
    mean, recall, decay = statistics(values)
    assert mean == pytest.approx(math.fsum(values) / count)
    assert recall == (values > 0.5).sum() / count
    # the quarters reach from frame 1 + (count - 1) * k / 4 to the next one's, halves rounded up, both ends counted
    bounds = [math.floor(1 + (count - 1) * part / 4 + 0.5) for part in range(5)]
    first = math.fsum(values[bounds[0] - 1 : bounds[1]]) / (bounds[1] - bounds[0] + 1)
    last = math.fsum(values[bounds[3] - 1 : bounds[4]]) / (bounds[4] - bounds[3] + 1)
    assert decay == pytest.approx(first - last, abs=1e-12)
    if count >= 300:
        assert decay == pytest.approx(0.75, abs=0.01)


def test_a_frame_of_exactly_one_half_is_not_recalled():
    assert statistics([0.5, 0.5, 1.0]).recall == pytest.approx(1 / 3)


def test_statistics_need_a_frame():
    with pytest.raises(ValueError, match="at least one value a frame"):
        statistics([])


def _brute_force(prediction, truth, reach=None):
    """F by the distance of every contour pixel to the other contour, pixel by pixel."""
    reach = reach or math.ceil(0.008 * math.hypot(*truth.shape))
    contours = []
    for mask in (prediction, truth):
        padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
        contours.append((mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:]))
    if not (contours[0].any() and contours[1].any()):
        return float(contours[0].any() == contours[1].any())
    shares = [(distance_transform_edt(~contours[1 - side])[contours[side]] <= reach).mean() for side in (0, 1)]
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 90), st.integers(1, 150)),
    st.sampled_from([0.001, 0.02, 0.3, 0.9]),
)
def test_both_measures_on_random_masks(seed, shape, share):
    """Against distances measured pixel by pixel."""
    random = np.random.default_rng(seed)
    blocks = random.random((2, -(-shape[0] // 6), -(-shape[1] // 6))) < share
    masks = np.kron(blocks, np.ones((6, 6), dtype=bool))[:, : shape[0], : shape[1]] ^ (
        random.random((2, *shape)) < 0.002
    )
    prediction, truth = masks
    void = random.random(shape) < 0.05
    assert contour_accuracy(prediction, truth) == pytest.approx(_brute_force(prediction, truth), abs=1e-12)
    clean = contour_accuracy(prediction, truth, void)
    assert clean == pytest.approx(_brute_force(prediction & ~void, truth & ~void), abs=1e-12)
    union = ((prediction | truth) & ~void).sum()
    shared = (prediction & truth & ~void).sum()
    assert region_similarity(prediction, truth, void) == pytest.approx(shared / union if union else 1.0, abs=1e-12)


def test_a_contour_matches_within_a_disk():
    """Single points at every offset around the reach of a 1080p frame, 18 px."""
    reach = math.ceil(0.008 * math.hypot(1080, 1920))
    prediction, truth = np.zeros((2, 1080, 1920), dtype=bool)
    prediction[500, 700] = True
    around = np.s_[470:530, 670:730]
    matched = 0
    for down in range(reach + 3):
        for right in range(reach + 3):
            truth[500 + down, 700 + right] = True
            score = contour_accuracy(prediction, truth)
            assert score == pytest.approx(_brute_force(prediction[around], truth[around], reach), abs=1e-12)
            truth[500 + down, 700 + right] = False
            matched += score > 0
    assert 200 < matched < (reach + 3) ** 2


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
