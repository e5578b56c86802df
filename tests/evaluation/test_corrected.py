"""Corrections: the worst frame's true mask is given, and the video tracked anew."""

import json
from dataclasses import replace

import numpy as np
import pytest
from answers import refused

from stm_model.evaluation.corrections import corrected, correction_rows
from stm_model.evaluation.protocol import open_dataset
from stm_model.evaluation.scoring import ObjectScore
from stm_model.io.masks import read_mask

REGION = (0.9, 0.2, 0.4, 0.8, 0.7, 0.6, 0.5, 0.1)


@pytest.fixture
def ants(davis):
    dataset = open_dataset("davis2017", davis)
    return replace(dataset, videos=tuple(video for video in dataset.videos if video.name == "ant"))


def scores(*regions: tuple[float, ...]) -> list[ObjectScore]:
    frames = tuple(range(1, 1 + len(REGION)))
    return [ObjectScore("ant", label, None, frames, region, region) for label, region in enumerate(regions, 1)]


def test_the_worst_frame_of_the_first_three_quarters_is_corrected(ants):
    once = corrected(ants, scores(REGION))
    assert [video.corrected for video in once.videos] == [(2,)]
    # the mean over objects counts, and no frame is corrected twice
    other = (0.9, 0.9, 0.9, 0.0, 0.7, 0.6, 0.5, 0.1)
    assert corrected(once, scores(REGION, other)).videos[0].corrected == (2, 4)
    assert corrected(ants, []).videos[0].corrected == ()


def test_the_whole_true_mask_is_given(ants):
    (video,) = corrected(ants, scores(REGION)).videos
    assert sorted(video.given_masks()) == [0, 2]
    assert np.array_equal(video.given_masks()[2], video.read_annotation(2))


def test_rows_compare_the_frames_after_each_correction(ants):
    once = corrected(ants, scores(REGION))
    better = (0.9, 1.0, 0.6, 0.8, 0.7, 0.6, 0.9, 0.9)
    none, one = correction_rows([(ants, scores(REGION)), (once, scores(better))])
    assert none == {"corrections": 0, "J-Mean": pytest.approx(0.525), "F-Mean": pytest.approx(0.525)}
    assert one["before"] == pytest.approx(np.mean(REGION[2:])) and one["after"] == pytest.approx(np.mean(better[2:]))
    assert one["frames"] == {"ant": 2} and one["corrections"] == 1


@pytest.mark.parametrize("ways", [(), ("--both-ways",)])
def test_the_command_corrects_and_tells(evaluate, davis, tmp_path, ways):
    code, out, err = evaluate("--corrections", 2, "--no-report", *ways)
    assert (code, err) == (0, "") and "before" in out and "after" in out
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    rows = written["corrections"]
    assert [row["corrections"] for row in rows] == [0, 1, 2]
    assert written["scores"]["J-Mean"] == pytest.approx(rows[-1]["J-Mean"])
    for video in open_dataset("davis2017", davis).videos:
        for row in rows[1:]:
            frame = row["frames"][video.name]
            mask = read_mask(tmp_path / "out" / "masks" / video.name / video.mask_name(frame))
            assert np.array_equal(mask, video.read_annotation(frame))
    assert rows[1]["frames"] != rows[2]["frames"]


def test_what_makes_no_sense_with_it(evaluate, youtube_vos):
    assert refused(evaluate("--corrections", -1, checkpoint=None), "corrections: expected at least 0, got -1")
    assert refused(evaluate("--corrections", 1, "--study", "memory"), "corrections", "--study")
    assert refused(evaluate("--corrections", 1, "--resume"), "resume", "--corrections")
