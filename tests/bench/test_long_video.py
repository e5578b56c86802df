"""The bench of long videos: what it writes, and that a long memory is exact."""

import json
from pathlib import Path

import pytest
import torch

import bench.long_video as long_video
from bench.harness import attempt
from bench.long_video import READERS, LongVideo, Sizes, figures

TINY = Sizes((4, 6), (1, 8, 32), 8, 16, 24, repeats=2)
SHORT = LongVideo(120, 10, 8, (32, 48), gone=20, budget="200KiB", memory="every:1")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a process are read from Linux")
def test_a_dry_run_writes_figures(tmp_path, capsys):
    path = tmp_path / "deep" / "long.json"
    assert long_video.main(["--device", "cpu", "--out", str(path)], TINY, SHORT, attempt) == 0
    results = json.loads(path.read_text())["results"]
    frames = [cell for cell in results.values() if "reader" in cell]
    assert {(cell["T"], cell["reader"]) for cell in frames} == {
        (count, reader) for count in (1, 8, 32) for reader in READERS
    }
    for cell in frames:
        # a budget of 8 frames of 24 positions is rounded up to two pages of 128
        held = 10 if cell["reader"] in ("fifo", "use") and cell["T"] > 8 else cell["T"]
        assert cell["frames_in_memory"] == held and cell["peak_bytes"] >= 0
        assert cell["seconds"] > 0
    run = results["run, 120 frames"]
    # a page of 128 positions of 6 a frame in float32, two in bfloat16, of a key of 64 channels and two values of 128
    full = run["full_after_frames"]
    assert full in (21, 42) and run["memory"]["most_bytes"]["device"] == 128 * (64 + 2 * 128) * 4
    assert run["windows"] == {"early": [full + 1, full + 11], "late": [110, 120]}
    share, back = results["share, T=32"], results["back, gone for 20 frames"]
    # a tenth, rounded up, and the 5 frames on probation
    assert share["frames_in_memory"] == {"everything kept": 32, "a tenth kept": 8} and share["faster"] > 0
    J, held = back["J"], back["memory"]
    assert held["everything kept"]["positions_dropped"] == 0 < held["budget"]["positions_dropped"]
    assert J["budget"]["back"] == pytest.approx(J["everything kept"]["back"], abs=0.05)
    said = capsys.readouterr().out
    assert f'"full_after_frames": {full}' in said and "seconds a frame" in said


def test_a_section_alone_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "long.json"
    assert long_video.main(["--device", "cpu", "--only", "share", "--out", str(path)], TINY, SHORT) == 0
    assert list(json.loads(path.read_text())["results"]) == ["share, T=32"]


def test_what_is_seen_of_each_mask_becomes_figures():
    video = LongVideo(frames=200, window=2)
    # a frame takes a second, half of it on the processor; from frame 150 on twice that, and a tenth more memory
    stamps = [float(index + max(0, index - 150)) for index in range(200)]
    seen = [(1100 if index >= 150 else 1000, stamps[index], 99 + stamps[index] / 2) for index in range(200)]
    found = figures(video, seen, full=9)
    assert (found["early"]["held_bytes"], found["late"]["held_bytes"], found["most_held_bytes"]) == (1000, 1100, 1100)
    assert found["late_over_early"] == pytest.approx({"held_bytes": 1.1, "seconds": 2, "processor_seconds": 2})
    assert found["early"]["processor_seconds"] == pytest.approx(0.5)


def test_the_clip_goes_there_and_back():
    video = LongVideo(frames=9, clip=4)
    assert [video.clip_index(frame) for frame in range(9)] == [0, 1, 2, 3, 2, 1, 0, 1, 2]


def test_a_command_that_fails_is_said(monkeypatch):
    monkeypatch.setattr(long_video, "prepare", lambda *_: ["track"])
    found = long_video.track_long_video(LongVideo(frames=3), torch.device("cpu"))
    assert found == {"failed": "stm track ended with code 2"}


def test_wrong_options_are_one_line(capsys):
    for words, message in (
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--only", "all"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as end:
            long_video.main(words)
        assert end.value.code == 2 and message in capsys.readouterr().err
