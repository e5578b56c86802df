"""`stm evaluate --resume`: an evaluation that was stopped goes on to what an unbroken one gives."""

import json
import shutil

import pytest
from answers import refused

from stm_model import STM, STMConfig, Tracker
from stm_model.network.weights import write_tensors


def _stop_in(monkeypatch, length, frame):
    """Ctrl-C in the video of so many frames."""
    track = Tracker.track

    def stopping(self, frames, masks):
        for result in track(self, frames, masks):
            if (len(frames), result.index) == (length, frame):
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(Tracker, "track", stopping)


def _written(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.png"))}


def test_what_is_tracked_stays_and_the_rest_is_done(evaluate, tmp_path, monkeypatch):
    masks = tmp_path / "out" / "masks"
    with monkeypatch.context() as patch:
        # the videos have 9, 6 and 7 frames, and the longest comes first
        _stop_in(patch, length=7, frame=3)
        code, out, err = evaluate("--no-report")
    assert (code, out) == (130, "")
    assert err == "stm: error: interrupted; what is tracked is kept, and --resume goes on\n"
    before = _written(masks)
    assert {path.parts[0] for path in before} == {"ant", "cat"} and len(before) == 9 + 3
    code, out, err = evaluate("--no-report", "--resume")
    assert (code, err) == (0, "") and "tracked" in out
    after = _written(masks)
    assert all(after[path] == time for path, time in before.items() if path.parts[0] == "ant")
    assert evaluate("--no-report", out=tmp_path / "unbroken")[0] == 0
    assert after.keys() == _written(tmp_path / "unbroken" / "masks").keys()
    for path in after:
        assert (masks / path).read_bytes() == (tmp_path / "unbroken" / "masks" / path).read_bytes()
    resumed, unbroken = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("out", "unbroken"))
    assert resumed["scores"] == unbroken["scores"] and resumed["speed"]["frames"] == 6 + 7
    # nothing is left: it is scored again
    code, out, err = evaluate("--no-report", "--resume")
    assert (code, err) == (0, "") and _written(masks) == after and "tracked" in out


def test_what_was_made_otherwise_is_refused(evaluate, davis, tmp_path):
    assert evaluate("--no-report", "--videos", "bee", "--resume")[0] == 0, "there is nothing to go on with yet"
    before = _written(tmp_path / "out")
    other = tmp_path / "other.safetensors"
    write_tensors(
        STM(STMConfig("resnet18", key_channels=16, value_channels=16, decoder_channels=16)).state_dict(), other
    )
    shutil.copytree(davis, tmp_path / "davis")
    for changed, words in (
        ({"checkpoint": other}, "weights: not as "),
        ({"data": tmp_path / "davis"}, "data: not as "),
        ({"dataset": "davis2016"}, "dataset: not as "),
    ):
        assert refused(evaluate("--no-report", "--resume", **changed), words, "--overwrite")
    assert refused(evaluate("--no-report", "--resume", "--memory", "first"), "memory: not as ", "None, now first")
    assert _written(tmp_path / "out") == before
    # which videos and how they are reported is free
    assert evaluate("--no-report", "--resume", "--videos", "bee", "cat")[0] == 0


@pytest.mark.parametrize("content", ["mine", "[]", "{}"])
def test_another_folder_is_refused(evaluate, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.json").write_text(content)
    assert refused(evaluate("--resume"), "holds something other than an evaluation")
    assert (tmp_path / "out" / "evaluation.json").read_text() == content


@pytest.mark.parametrize("other", [["--overwrite"], ["--study", "memory"]])
def test_what_does_not_go_with_it_is_refused(evaluate, other):
    assert refused(evaluate("--resume", *other), "resume: goes on with tracking")
