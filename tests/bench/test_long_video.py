"""The bench of long videos: what it writes, and that a long memory is exact."""

import json
from pathlib import Path

import pytest
import torch

import bench.long_video as long_video
from bench.long_video import READERS, LongVideo, Seen, Sizes, exactness, figures


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a process are read from Linux")
def test_a_dry_run_writes_figures(tmp_path, capsys):
    path = tmp_path / "deep" / "long.json"
    words = ["--quick", "--device", "cpu", "--workers", "0", "--out", str(path)]
    assert long_video.main(words) == 0
    results = json.loads(path.read_text())["results"]
    frames = [cell for cell in results.values() if "reader" in cell]
    assert {(cell["T"], cell["reader"]) for cell in frames} == {
        (count, reader) for count in (1, 8, 32) for reader in READERS
    }
    for cell in frames:
        # a budget of 8 frames of 24 positions is rounded up to two pages of 128
        held = 10 if cell["reader"] in ("fifo", "use") and cell["T"] > 8 else cell["T"]
        assert cell["frames_in_memory"] == held and cell["peak_bytes"] >= 0
        assert 0 < cell["append_seconds"] and 0 < cell["seconds"]
    exact = [cell["error_over_allowed"] for name, cell in results.items() if name.startswith("exact")]
    assert len(exact) == 6 and max(exact) <= 1
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
    assert (
        f"run, 120 frames, budget 200KiB, full after {full} frames" in said and "exact, bfloat16, host: error" in said
    )
    # a section done anew leaves the others
    assert long_video.main([*words, "--only", "exact"]) == 0
    again = json.loads(path.read_text())["results"]
    assert again.keys() == results.keys() and again["run, 120 frames"] == run


@pytest.mark.parametrize("share", [None, 0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_frames_are_exact(share, dtype):
    found = exactness(Sizes((0, 0), (), 0, (1000, 12), 16, 24), share, torch.device("cpu"), dtype)
    assert found["error_over_allowed"] <= 1, found
    on_device = {None: 100, 0.5: 50, 0.0: 0}[share]
    assert found["pages"] == {"device": on_device, "host": 100 - on_device}


def test_what_is_seen_of_each_mask_becomes_figures():
    video = LongVideo(frames=200, window=2)
    # a frame takes a second, half of it on the processor; from frame 150 on twice that, and a tenth more memory
    stamps = [float(index + max(0, index - 150)) for index in range(200)]
    seen = [Seen(1100 if index >= 150 else 1000, stamps[index], 99 + stamps[index] / 2) for index in range(200)]
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
        (["--frames", "9"], "--frames: expected at least 3000"),
        (["--only", "all"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as end:
            long_video.main(words)
        assert end.value.code == 2 and message in capsys.readouterr().err
