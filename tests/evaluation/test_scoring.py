"""Submissions scored: against masks whose score is known, over processes, and what is wrong with a folder named."""

import csv
import shutil

import numpy as np
import pytest

from stm_model.evaluation.metrics import contour_accuracy, region_similarity, sequence_scores
from stm_model.evaluation.protocol import Dataset, Video, open_dataset
from stm_model.evaluation.scoring import ResultError, score
from stm_model.evaluation.tables import summarize, write_score_tables
from stm_model.io.masks import read_mask, write_mask


def _shifted(labels):
    return np.roll(labels, 3, axis=1)


def test_a_submission_is_scored_object_by_object(davis, tmp_path, copy_truth):
    dataset = open_dataset("davis2017", davis)
    copy_truth(dataset, tmp_path / "results", _shifted)
    scores = score(dataset, tmp_path / "results", workers=1)
    assert [(row.video, row.label) for row in scores] == [
        (name, label) for name in ("ant", "bee", "cat") for label in (1, 2)
    ]
    for video in dataset.videos:
        truths = [video.read_annotation(frame) for frame in video.asked]
        expected = sequence_scores([_shifted(truth) for truth in truths], truths)
        for row in scores:
            if row.video == video.name:
                assert (row.region_statistics.mean, row.contour_statistics.mean) == pytest.approx(expected[row.label])
                assert row.frames == tuple(range(1, len(truths) - 1))
    means = summarize("davis2017", scores)
    assert means["J-Mean"] == pytest.approx(np.mean([row.region_statistics.mean for row in scores]))
    assert means["J&F-Mean"] == pytest.approx((means["J-Mean"] + means["F-Mean"]) / 2)
    assert 0.2 < means["J-Mean"] < 0.95


def test_processes_give_the_same_scores(davis, tmp_path, copy_truth):
    dataset = open_dataset("davis2017", davis)
    copy_truth(dataset, tmp_path / "results", _shifted)
    assert score(dataset, tmp_path / "results", workers=2) == score(dataset, tmp_path / "results", workers=1)


def test_the_truth_scores_one_and_the_floor_repeats_the_first_mask(davis, clips, tmp_path, copy_truth):
    dataset = open_dataset("davis2017", davis)
    copy_truth(dataset, tmp_path / "results")
    perfect = summarize("davis2017", score(dataset, tmp_path / "results", workers=1))
    assert perfect == pytest.approx(dict.fromkeys(perfect, 1.0) | {"J-Decay": 0.0, "F-Decay": 0.0})
    floor = score(dataset, None, workers=1)
    labels = clips["cat"][1]
    expected = sequence_scores([labels[0]] * len(labels), labels)
    assert {row.label: row.region_statistics.mean for row in floor if row.video == "cat"} == pytest.approx(
        {label: region for label, (region, _) in expected.items()}
    )


def test_the_floor_takes_in_objects_that_enter_late(youtube_vos, clips):
    scores = score(open_dataset("youtube_vos", youtube_vos), None, workers=1)
    second = next(row for row in scores if (row.video, row.label) == ("ant", 2))
    labels = clips["ant"][1]
    assert second.region == pytest.approx([region_similarity(labels[4] == 2, labels[frame] == 2) for frame in (6, 8)])


def test_the_floor_takes_a_later_mask_from_its_own_frame_on(tmp_path):
    """The second object enters in frame 2, on half of the first one's mask; what is void there stays as it was."""
    frames = [tmp_path / f"{index:05d}.jpg" for index in range(4)]
    first = np.zeros((30, 40), dtype=np.uint8)
    first[5:25, 10:30] = 1
    second = first.copy()
    second[5:25, 20:30], second[5:25, 10:12] = 2, 255
    for index, mask in enumerate((first, first, second, first)):
        write_mask(tmp_path / f"{index:05d}.png", mask)
    masks = {index: tmp_path / f"{index:05d}.png" for index in range(4)}
    given, scored = {0: (1,), 2: (2,)}, {1: (1,), 2: (1,), 3: (1,)}
    video = Video("late", tuple(frames), masks, entries=given, asked=tuple(range(4)), scored=scored)
    (row,) = score(Dataset("youtube_vos", "valid", (video,)), None, workers=1)
    assert row.region == pytest.approx([1.0, 1.0, 0.5])


def test_youtube_vos_means_over_seen_and_unseen(youtube_vos, tmp_path, copy_truth):
    dataset = open_dataset("youtube_vos", youtube_vos)
    copy_truth(dataset, tmp_path / "results", lambda labels: np.where(labels == 2, 0, labels))
    scores = score(dataset, tmp_path / "results", workers=1)
    assert [(row.video, row.label, row.frames, row.group) for row in scores] == [
        ("ant", 1, (2, 4, 6, 8), "seen"),
        ("ant", 2, (6, 8), "unseen"),
        ("bee", 1, (4,), "seen"),
    ]
    assert summarize("youtube_vos", scores) == {
        "Overall": 0.5,
        "J_seen": 1.0,
        "J_unseen": 0.0,
        "F_seen": 1.0,
        "F_unseen": 0.0,
    }
    # the folder inside a submission may be left out
    moved = (tmp_path / "results" / "Annotations").rename(tmp_path / "bare")
    assert score(dataset, moved, workers=1) == scores


def test_black_and_white_results_of_one_object(davis, tmp_path, copy_truth):
    dataset = open_dataset("davis2016", davis)
    copy_truth(dataset, tmp_path / "results", lambda labels: np.where(labels == 1, 255, 0).astype(np.uint8))
    with pytest.raises(ResultError, match=r"ant/0000\d.png: black and white .0 and 255.*--binary"):
        score(dataset, tmp_path / "results", workers=1)
    scores = score(dataset, tmp_path / "results", binary=True, workers=1)
    assert [row.region_statistics.mean for row in scores] == [1.0] * 3
    with pytest.raises(ResultError, match="can't tell the 2 objects of ant"):
        score(open_dataset("davis2017", davis), tmp_path / "results", binary=True, workers=1)


def test_black_and_white_results_beside_such_annotations(davis, tmp_path, copy_truth):
    root = shutil.copytree(davis, tmp_path / "davis")
    for path in root.glob("Annotations/480p/*/*.png"):
        write_mask(path, np.where(read_mask(path) > 0, 255, 0))
    dataset = open_dataset("davis2016", root)
    copy_truth(dataset, tmp_path / "results", lambda labels: np.where(labels == 1, 255, 0).astype(np.uint8))
    assert [row.region_statistics.mean for row in score(dataset, tmp_path / "results", workers=1)] == [1.0] * 3


def test_void_pixels_count_for_nothing(davis, tmp_path, copy_truth):
    dataset = open_dataset("davis2017", davis, videos=["bee"])
    copy_truth(dataset, tmp_path / "results", lambda labels: np.maximum(labels, np.arange(80) < 20).astype(np.uint8))
    root = shutil.copytree(davis, tmp_path / "davis")
    for path in root.glob("Annotations/480p/bee/*.png"):
        labels = read_mask(path)
        labels[:, :20] = 255
        write_mask(path, labels)
    spilled = score(dataset, tmp_path / "results", workers=1)
    ignored = score(open_dataset("davis2017", root, videos=["bee"]), tmp_path / "results", workers=1)
    assert spilled[0].region_statistics.mean < 0.9 and ignored[0].region_statistics.mean == 1.0
    assert ignored[0].contour_statistics.mean == 1.0


def test_a_sequence_of_300_frames(tmp_path):
    """A square that is lost bit by bit: every J is known, and the decay, which 8 bits cannot count."""
    frames = [tmp_path / "frames" / f"{index:05d}.jpg" for index in range(302)]
    truth = np.zeros((30, 40), dtype=np.uint8)
    truth[5:25, 5:20] = 1
    (tmp_path / "results" / "long").mkdir(parents=True)
    write_mask(tmp_path / "truth.png", truth)
    lost = [min(index * 300 // 302, 299) for index in range(302)]
    for index, path in enumerate(frames):
        kept = np.zeros_like(truth)
        kept[5:25, 5:20] = (np.arange(300) >= lost[index]).reshape(20, 15)
        write_mask(tmp_path / "results" / "long" / f"{path.stem}.png", kept)
    video = Video(
        "long",
        tuple(frames),
        dict.fromkeys(range(302), tmp_path / "truth.png"),
        entries={0: (1,)},
        asked=tuple(range(302)),
        scored=dict.fromkeys(range(1, 301), (1,)),
    )
    (row,) = score(Dataset("davis2017", "val", (video,)), tmp_path / "results", workers=1)
    assert row.frames == tuple(range(1, 301))
    assert row.region == pytest.approx([1 - lost[frame] / 300 for frame in range(1, 301)])
    # quarters of 300 frames begin at 1, 76 (75.75), 151 (150.5), 225 (225.25) and end at 300, counted from 1
    expected = np.mean(row.region[:76]) - np.mean(row.region[224:])
    assert row.region_statistics.decay == pytest.approx(expected, abs=1e-12) and expected > 0.7
    assert row.region_statistics.recall == np.mean(np.array(row.region) > 0.5)


def _with_label(path, label):
    labels = read_mask(path)
    labels[0, 0] = label
    write_mask(path, labels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "bee/00003.png").unlink(), r"bee/00003.png is missing"),
        (lambda folder: shutil.rmtree(folder / "bee"), r"no folder .*bee for the video bee"),
        (lambda folder: (shutil.rmtree(folder), folder.mkdir()), r"results is empty"),
        (lambda folder: shutil.rmtree(folder), r"no folder .*results"),
        (lambda folder: _with_label(folder / "bee/00003.png", 9), r"bee/00003.png: label 9 is no object.*0, 1, 2"),
        (lambda folder: _with_label(folder / "bee/00003.png", 255), r"bee/00003.png: label 255 is no object"),
        (
            lambda folder: write_mask(folder / "bee/00003.png", np.zeros((47, 80))),
            r"bee/00003.png: 80x47 pixels; expected 80x48",
        ),
        (
            lambda folder: write_mask(folder / "bee/00003.png", np.full((48, 80), 255)),
            r"bee/00003.png: black and white .0 and 255.; expected labels 0, 1, 2$",
        ),
        (lambda folder: (folder / "bee/00003.png").write_bytes(b"no"), r"bee/00003.png: cannot be read"),
    ],
)
def test_a_broken_submission_is_named(davis, tmp_path, copy_truth, change, words):
    dataset = open_dataset("davis2017", davis)
    copy_truth(dataset, tmp_path / "results")
    change(tmp_path / "results")
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        score(dataset, tmp_path / "results", workers=1)


def test_an_error_in_a_process_is_the_same_error(davis, tmp_path, copy_truth):
    dataset = open_dataset("davis2017", davis)
    copy_truth(dataset, tmp_path / "results")
    _with_label(tmp_path / "results/bee/00003.png", 9)
    with pytest.raises(ResultError, match=r"bee/00003.png: label 9 is no object"):
        score(dataset, tmp_path / "results", workers=2)


def test_masks_of_the_ends_are_not_needed(davis, tmp_path, copy_truth):
    """DAVIS scores neither."""
    dataset = open_dataset("davis2017", davis)
    copy_truth(dataset, tmp_path / "results")
    for name in ("00000.png", "00005.png"):
        (tmp_path / "results" / "bee" / name).unlink()
    assert len(score(dataset, tmp_path / "results", workers=1)) == 6


def test_the_official_tables(davis, tmp_path, copy_truth):
    dataset = open_dataset("davis2017", davis)
    copy_truth(dataset, tmp_path / "results", _shifted)
    scores = score(dataset, tmp_path / "results", workers=1)
    write_score_tables(tmp_path, dataset, scores)
    (row,) = csv.DictReader(open(tmp_path / "global_results-val.csv"))
    assert list(row) == ["J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay"]
    assert float(row["J-Mean"]) == pytest.approx(summarize("davis2017", scores)["J-Mean"], abs=1e-6)
    rows = list(csv.DictReader(open(tmp_path / "per-sequence_results-val.csv")))
    assert [row["Sequence"] for row in rows] == ["ant_1", "ant_2", "bee_1", "bee_2", "cat_1", "cat_2"]
    assert list(rows[0]) == ["Sequence", "J-Mean", "F-Mean"]
    assert float(rows[3]["F-Mean"]) == pytest.approx(scores[3].contour_statistics.mean, abs=1e-6)
    truth = open_dataset("davis2017", davis).videos[1].read_annotation(2)
    assert scores[3].contour[1] == contour_accuracy(_shifted(truth) == 2, truth == 2)
