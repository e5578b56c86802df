"""What trust tells of wrong masks, by numbers made up so that they can be counted by hand."""

import json

import pytest

from stm_model.evaluation.certainty import certainty_scores
from stm_model.evaluation.scoring import ObjectScore


def object_score(region, label=1, video="bear"):
    frames = tuple(range(1, len(region) + 1))
    return ObjectScore(video, label, None, frames, tuple(region), tuple(region))


def scores_of(tmp_path, region, certainty):
    known = {"1": {str(frame): value for frame, value in enumerate(certainty, 1)}}
    (tmp_path / "bear.json").write_text(json.dumps(known))
    return certainty_scores(
        [object_score(region), object_score([0.1], label=2), object_score([0.1], video="cow")], tmp_path
    )


def test_area_precision_and_recall_of_wrong_masks(tmp_path):
    # three wrong ones: at 0.05, 0.35 and 0.55; 4, 3 and 2 of the right ones are surer, one as sure
    found = scores_of(tmp_path, [0.9, 0.4, 0.8, 0.3, 0.6, 0.2, 0.7], [0.7, 0.05, 0.55, 0.35, 0.25, 0.55, 0.65])
    assert found["masks"] == 7
    assert found["wrong"]["count"] == 3 and found["wrong"]["auc"] == pytest.approx((4 + 3 + 2.5) / 12)
    # below 0.4: frames 2, 4 and 5
    assert found["wrong"]["precision"] == pytest.approx(2 / 3) and found["wrong"]["recall"] == pytest.approx(2 / 3)


def test_a_fall_is_from_the_mean_until_then(tmp_path):
    # means until then: –, 0.9, 0.8, 0.7
    found = scores_of(tmp_path, [0.9, 0.7, 0.5, 0.51], [0.9, 0.2, 0.3, 0.9])
    assert found["fallen"] == {"count": 2, "auc": 1.0, "precision": 1.0, "recall": 1.0}


def test_what_has_no_value_is_none(tmp_path):
    empty = certainty_scores([], tmp_path)
    assert empty["masks"] == 0 and empty["wrong"] == {"count": 0, "auc": None, "precision": None, "recall": None}
    right = scores_of(tmp_path, [0.9, 0.8], [0.9, 0.3])
    assert right["wrong"] == {"count": 0, "auc": None, "precision": 0.0, "recall": None}
