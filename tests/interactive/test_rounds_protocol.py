"""The interactive protocol by its properties, `stm evaluate --dataset davis-interactive`, and the official session."""

import csv
import itertools
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from answers import refused
from drawing import scribble_file

import stm_model.interactive.evaluate as module
from stm_model import STM, STMConfig
from stm_model.commands.main import main
from stm_model.evaluation.metrics import sequence_scores
from stm_model.interactive.config import EvaluateInteractiveConfig
from stm_model.interactive.protocol import (
    Round,
    Sample,
    drive,
    next_scribbles,
    run_rounds,
    score_frames,
    summarize_samples,
)
from stm_model.interactive.session import ScribbleSession
from stm_model.io import images
from stm_model.io.masks import read_mask
from stm_model.network.weights import write_tensors
from stm_model.runtime import DEFAULT_INTERACTIVE_WEIGHTS
from stm_model.tracking.resume import source_digest


class Stub:
    """A session that answers with masks made beforehand, one after the other, and keeps what it was told."""

    def __init__(self, *answers):
        self.answers, self.drawn = list(answers), []

    def add_scribbles(self, frame_index, scribbles):
        self.drawn.append((frame_index, scribbles))

    def run(self):
        self.answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def masks(self):
        return self.answer


@pytest.fixture(scope="module")
def truths():
    labels = np.zeros((6, 60, 90), np.uint8)
    for index, frame in enumerate(labels):
        frame[10:40, 10 + 3 * index : 40 + 3 * index] = 1
        frame[20:50, 60:80] = 2
    labels[0][labels[0] == 2] = 0
    return labels


def test_the_robot_corrects_the_worst_frames_and_is_done_with_a_perfect_one(truths):
    half = truths.copy()
    half[:, 25:] = 0
    half[3] = 0
    session = Stub(half, half, truths)
    results = list(run_rounds(session, truths, [1, 2]))
    assert [len(session.drawn), len(results)] == [3, 3]
    frames = [frame for frame, _ in session.drawn]
    # first a frame that has both objects, then the empty one, then one that was not drawn on
    assert truths[frames[0]].max() == 2 and frames[1] == 3 and frames[2] not in frames[:2]
    assert {scribble["object_id"] for scribble in session.drawn[0][1]} == {1, 2}
    rounds = [done for done, _ in results]
    assert rounds[0].region == rounds[1].region < 1 and rounds[2].region == rounds[2].contour == 1
    assert [done.scribbles for done in rounds] == [len(scribbles) for _, scribbles in session.drawn]


def test_a_frame_without_anything_to_scribble_on_is_passed_over(truths):
    truths, masks = truths.copy(), truths.copy()
    # what is missing in the worst frame is one pixel, which no stroke fits
    truths[1], masks[1] = 0, 0
    truths[1, 5, 5] = 1
    masks[4, 10:25] = 0
    frame, scribbles = next_scribbles(masks, truths, [1, 2], {1: 0.0, 2: 1.0, 4: 0.7}, used=[])
    assert frame == 4 and scribbles
    assert next_scribbles(masks, truths, [1, 2], {1: 0.0, 2: 1.0}, used=[])[1] == []


def test_the_worst_frame_comes_first_and_those_used_before_last(truths):
    masks = np.zeros_like(truths)
    scores = {1: 0.5, 2: 0.2, 3: 0.2, 4: 0.9}
    for used, expected in (([], 2), ([2], 3), ([2, 3], 1), ([1, 2, 3], 4), ([1, 2, 3, 4], 2)):
        assert next_scribbles(masks, truths, [1, 2], scores, used)[0] == expected


def test_frames_are_scored_as_everywhere_without_void_and_with_both_ends(truths):
    masks = np.roll(truths, 5, axis=2)
    truths = truths.copy()
    truths[2:, 5:30, 30:70] = 255
    region, contour = score_frames(masks, truths, [1, 2])
    assert region.shape == contour.shape == (6, 2)
    expected = sequence_scores(masks, truths, [1, 2], skip_ends=False)
    np.testing.assert_allclose(np.stack([region.mean(0), contour.mean(0)], 1), list(expected.values()))


def test_given_scribbles_come_first(truths):
    drawn = [{"path": [[0.5, 0.5]], "object_id": 1}]
    session = Stub(np.zeros_like(truths))
    list(run_rounds(session, truths, [1, 2], first=(4, drawn), interactions=2))
    assert session.drawn[0] == (4, drawn) and session.drawn[1][0] != 4 and len(session.drawn) == 2


def test_a_round_beyond_the_budget_is_not_done(truths):
    # two objects, three rounds: 180 seconds
    for seconds, count in ((59, 3), (60, 3), (61, 2), (181, 0)):
        session = Stub(np.zeros_like(truths))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            rule = {"interactions": 3, "name": "cows", "clock": itertools.count(0, seconds).__next__}
            results = list(run_rounds(session, truths, [1, 2], **rule))
        late = f"cows: round {count + 1} ended {seconds * (count + 1)} s after the start, 180 s are allowed"
        assert [str(one.message)[: len(late)] for one in said] == [late] * (count < 3)
        assert len(results) == count
        assert all(done.seconds == seconds for done, _ in results)


def _sample(values, seconds=10.0, objects=1, interactions=8):
    rounds = tuple(Round(0, 1, seconds, value, value) for value in values)
    return Sample("a", objects, interactions, rounds)


def test_the_area_of_a_constant_curve_is_the_constant():
    assert _sample([0.7] * 8, seconds=0.0).area == pytest.approx(0.7)
    # from 0 it climbs straight to the first round: half of what comes before that is lost
    assert _sample([0.7] * 8, seconds=24.0).area == pytest.approx(0.7 * (1 - 12 / 240))
    # twice the objects have twice the time
    assert _sample([0.7] * 8, seconds=24.0, objects=2).area == pytest.approx(0.7 * (1 - 12 / 480))
    assert _sample([]).area == _sample([]).at_threshold == 0.0


def test_the_curve_is_read_off_between_rounds():
    rising = _sample([0.2, 0.4, 0.6, 0.8], seconds=25.0)
    assert rising.at_threshold == pytest.approx(0.4 + 0.2 * 10 / 25)
    assert rising.after(0) == 0 and rising.after(2) == 0.4 and rising.after(8) == 0.8
    faster = _sample([0.2, 0.4, 0.6, 0.8], seconds=5.0)
    assert faster.at_threshold == 0.8 and faster.area > rising.area
    scores = summarize_samples([rising, _sample([1.0], seconds=0.0)], 8)
    assert scores["J&F@1"] == pytest.approx(0.6) and scores["J@8"] == pytest.approx(0.9)
    assert list(scores)[:5] == ["J&F@1", "J&F@3", "J&F@8", "AUC", "J&F@60s"]
    assert list(scores)[5:] == [f"{name}@{n}" for name in ("J", "F") for n in (1, 3, 8)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return STM(
        STMConfig("resnet18", key_channels=16, value_channels=16, decoder_channels=16, guidance="scribbles")
    ).eval()


@pytest.fixture
def evaluate(davis, model, tmp_path, capsys):
    """Run `stm evaluate --dataset davis-interactive`; the exit code, stdout and stderr."""
    checkpoint = tmp_path / "scribbles.safetensors"
    write_tensors(model.state_dict(), checkpoint)

    def run(*extra, data=davis, checkpoint=checkpoint):
        arguments = ["--dataset", "davis-interactive", "--data", data, "--out", tmp_path / "out", "--device", "cpu"]
        arguments += ["--checkpoint", checkpoint, "--interactions", 2, "--dtype", "float32"]
        code = main(["evaluate", *map(str, [*arguments, *extra])])
        return code, *capsys.readouterr()

    return run


def _rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_split_is_corrected_scored_and_reported(evaluate, davis, clips, tmp_path):
    code, out, err = evaluate()
    assert code == 0 and "stm: " not in err
    folder = tmp_path / "out"
    summary = json.loads((folder / "evaluation.json").read_text())
    assert "stopped" not in summary and summary["dataset"] == "davis-interactive (2017)"
    assert [row["sample"] for row in summary["samples"]] == sorted(clips)
    for row in summary["samples"]:
        frames, truth = clips[row["sample"]]
        masks = [read_mask(folder / "masks" / row["sample"] / f"{t:05d}.png") for t in range(len(frames))]
        scores = sequence_scores(masks, truth, [1, 2], skip_ends=False)
        assert len(row["rounds"]) == 2 and row["objects"] == 2
        # the masks that lie there are those of the last round
        assert row["J@2"] == pytest.approx(np.mean([region for region, _ in scores.values()]))
        assert row["rounds"][0]["frame"] != row["rounds"][1]["frame"]
    rounds = _rows(folder / "rounds.csv")
    assert len(rounds) == 6 and list(rounds[0])[:3] == ["Sample", "Round", "Frame"]
    assert [row["Sample"] for row in _rows(folder / "samples.csv")] == sorted(clips)
    for name in ("curve.png", "contact_sheet.png"):
        assert images.read_image(folder / name).std() > 10
    report = (folder / "report.html").read_text()
    assert "AUC" in report and report.count("data:image/png") == 2 and "http" not in report.replace("http-equiv", "")
    assert "mean" in out and "J&F@60s" in out and str(folder) in out


def test_a_split_of_davis_2016_is_one_object(evaluate, davis, tmp_path):
    root = shutil.copytree(davis, tmp_path / "davis")
    shutil.rmtree(root / "ImageSets" / "2017")
    code, out, _ = evaluate("--json", "--videos", "bee", data=root)
    summary = json.loads(out)
    assert code == 0 and summary["dataset"] == "davis-interactive (2016)" and summary["samples"][0]["objects"] == 1


def test_people_may_begin(evaluate, tmp_path):
    drawn = [{"path": [[0.3, 0.4], [0.6, 0.5]], "object_id": 2}]
    (tmp_path / "people" / "bee").mkdir(parents=True)
    for name, frame in (("001", 1), ("002", 3)):
        content = json.dumps(scribble_file("bee", {frame: drawn}, 6))
        (tmp_path / "people" / "bee" / f"{name}.json").write_text(content)
    code, out, _ = evaluate("--json", "--videos", "bee", "--scribbles", tmp_path / "people")
    samples = json.loads(out)["samples"]
    assert code == 0 and [row["sample"] for row in samples] == ["bee/001", "bee/002"]
    assert [row["rounds"][0]["frame"] for row in samples] == [1, 3]
    assert (tmp_path / "out" / "masks" / "bee" / "002" / "00000.png").is_file()


def test_a_killed_run_says_so_and_nothing_is_replaced_unasked(evaluate, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "run_rounds", killed)
        assert evaluate()[0] == 130
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["stopped"] == "unfinished"
    assert refused(evaluate(), "is not empty", "--overwrite")
    assert evaluate("--overwrite", "--videos", "bee")[0] == 0
    assert "stopped" not in json.loads((tmp_path / "out" / "evaluation.json").read_text())


def test_what_makes_no_sense_is_refused_before_anything_is_written(evaluate, davis, weights, tmp_path):
    people = tmp_path / "people"
    (people / "bee").mkdir(parents=True)
    (people / "bee" / "001.json").write_text("{")
    bee = ("--videos", "bee", "--scribbles", people)
    assert refused(evaluate("--interactions", "0"), "interactions: expected at least 1, got 0")
    assert refused(evaluate("--split", "none"), "no such file", "none.txt")
    assert refused(evaluate("--scribbles", people), "no .json in")
    assert refused(evaluate(*bee), "001.json", "broken JSON")
    two = {0: [{"path": [[0, 0]], "object_id": 1}], 1: [{"path": [[0, 0]], "object_id": 1}]}
    (people / "bee" / "001.json").write_text(json.dumps(scribble_file("bee", two, 6)))
    assert refused(evaluate(*bee), "expected scribbles on one frame to begin with, got 2 frames")
    (people / "bee" / "001.json").write_text(json.dumps(scribble_file("bee", {8: two[0]}, 9)))
    assert refused(evaluate(*bee), "scribbles on frame 8, but the video has 6 frames")
    assert refused(evaluate(checkpoint=tmp_path / "none.safetensors"), "checkpoint: no such file")
    assert refused(evaluate("--size", "3"), "size: expected at least 16 pixels, got 3")
    root = shutil.copytree(davis, tmp_path / "davis")
    for path in (root / "Annotations/480p/bee").glob("0000[1-9].png"):
        path.unlink()
    assert refused(evaluate("--videos", "bee", data=root), "bee: the robot needs the ground truth of every frame")
    # a network guided by masks reads no scribbles
    assert refused(evaluate(checkpoint=weights), "scribbles")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:-100])
    assert refused(evaluate(checkpoint=tmp_path / "cut.safetensors"), "cut.safetensors can't be read")
    assert not (tmp_path / "out").exists()


class Official:
    """A stand-in for the package's session: two samples of two interactions, by its documented methods."""

    def __init__(self, clips):
        self.todo = [(name, turn) for name in ("bee", "cat") for turn in (0, 1)]
        self.clips, self.submitted = clips, []

    def next(self):
        return len(self.submitted) < len(self.todo)

    def get_scribbles(self, only_last=False):
        assert only_last
        name, turn = self.todo[len(self.submitted)]
        drawn = [{"path": [[0.2 + 0.3 * turn, 0.4], [0.5, 0.5]], "object_id": 1 + turn}]
        return name, scribble_file(name, {2 * turn: drawn}, len(self.clips[name][0])), turn == 0

    def submit_masks(self, masks, next_scribble_frame_candidates=None):
        self.submitted.append(masks)


def test_the_official_session_drives_our_model(clips, model):
    official = Official(clips)
    drive(official, model, lambda name: clips[name][0])
    assert len(official.submitted) == 4
    for masks, (name, _) in zip(official.submitted, official.todo):
        assert masks.shape == clips[name][1].shape and masks.dtype == np.uint8
    # the second round of a sample knows the first one's scribbles, a new sample does not
    session = ScribbleSession(model, clips["cat"][0])
    for turn in (0, 1):
        session.add_scribbles(2 * turn, [{"path": [[0.2 + 0.3 * turn, 0.4], [0.5, 0.5]], "object_id": 1 + turn}])
        session.run()
    np.testing.assert_array_equal(official.submitted[3], session.masks())


def test_the_digest_is_that_of_the_interactive_weights(davis, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_run", lambda *_, **__: [])
    monkeypatch.setattr(module, "_finish", lambda *_: {})
    module.evaluate_interactive(EvaluateInteractiveConfig(davis, out=tmp_path / "out"))
    known = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert known["weights"] == source_digest(DEFAULT_INTERACTIVE_WEIGHTS)
