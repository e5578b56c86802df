"""The bench of long videos: what it writes, and that a long memory is exact."""

import json
from pathlib import Path

import pytest
import torch

import bench.long_run as long_run
import bench.long_video as long_video
from bench.long_memory import READERS, Sizes, exactness
from bench.long_run import LongVideo, Sample, figures
from stm_model.data.synthetic import procedural_clip
from stm_model.io.images import write_image, write_mask


@pytest.fixture
def davis(tmp_path) -> Path:
    """A made-up clip in the DAVIS layout."""
    root = tmp_path / "davis"
    frames, labels = procedural_clip(8, (48, 64), 1, seed=0)
    for kind in ("JPEGImages", "Annotations", "ImageSets"):
        (root / kind / ("2016" if kind == "ImageSets" else "48p/clip")).mkdir(parents=True)
    (root / "ImageSets/2016/held.txt").write_text("clip\n")
    for index in range(8):
        write_image(root / "JPEGImages/48p/clip" / f"{index:05d}.jpg", frames[index])
        write_mask(root / "Annotations/48p/clip" / f"{index:05d}.png", labels[index])
    return root


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a process are read from Linux")
# run in this process, a reader has no peak memory of its own
@pytest.mark.filterwarnings("ignore:Data has no positive values:UserWarning")
def test_a_dry_run_writes_figures_and_plots(davis, tmp_path, capsys):
    path = tmp_path / "deep" / "long.json"
    words = ["--quick", "--device", "cpu", "--workers", "0", "--data", str(davis), "--out", str(path)]
    assert long_video.main(words) == 0
    report = json.loads(path.read_text())
    for name in ("long.png", "long_run.png"):
        assert (path.parent / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    results = {section: report[section]["results"] for section in long_video.SECTIONS}
    assert {(cell["T"], cell["reader"]) for cell in results["frames"].values()} == {
        (count, reader) for count in (1, 8, 32) for reader in READERS
    }
    for cell in results["frames"].values():
        # a budget of 8 frames of 24 positions is rounded up to two pages of 128
        held = 10 if cell["reader"] in ("fifo", "importance") and cell["T"] > 8 else cell["T"]
        assert cell["frames_in_memory"] == held and cell["seconds"] > 0 and cell["peak_bytes"] >= 0
    assert [row["T"] for row in results["append"]["append"]["rows"]] == [1, 8, 32]
    assert all(max(cell["error_over_allowed"].values()) <= 1 for cell in results["exact"].values())
    host = results["host pages"]["host pages"]
    assert host["dry"] and host["floor_seconds"] == max(host["seconds"]["copy"], host["seconds"]["device"])
    scores = {name: (cell["evicted"] > 0, cell["most_frames_in_memory"]) for name, cell in results["J"].items()}
    # 12 positions a frame: ten frames in a page, of which the clip has seven
    assert scores == {
        f"every:1, {kept}": (False, 7) for kept in ("everything kept", "fifo, 3 frames", "importance, 3 frames")
    }
    (run,) = results["run"].values()
    assert run["full_after_frames"] == 21 and run["memory"]["most_bytes"]["device"] == 2 * 128 * (128 + 64) * 4
    assert run["windows"] == {"early": [30, 40], "late": [110, 120]} and len(run["trace"]) == 60
    said = capsys.readouterr().out
    assert "a dry run that means nothing" in said and "120 frames, budget 200KiB, full after 21 frames" in said


def test_a_section_done_anew_leaves_the_others(tmp_path, capsys):
    path = tmp_path / "long.json"
    words = ["--quick", "--device", "cpu", "--workers", "0", "--out", str(path), "--only"]
    assert long_video.main([*words, "append"]) == long_video.main([*words, "exact", "J"]) == 0
    report = json.loads(path.read_text())
    assert {"append", "exact", "J"} < set(report)
    assert all("no clips: --data names a folder" in cell["skipped"] for cell in report["J"]["results"].values())


@pytest.mark.parametrize("where", ["device", "half of it on the host", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_frames_are_exact(where, dtype):
    found = exactness(Sizes((0, 0), (), 0, (1000, 12), 16, 24), where, torch.device("cpu"), dtype)
    assert max(found["error_over_allowed"].values()) <= 1, found
    on_device = {"device": 100, "half of it on the host": 50, "host": 0}[where]
    assert found["pages"] == {"device": on_device, "host": 100 - on_device}


def test_the_pages_of_a_gpu_have_no_figures_here():
    found = long_video.build_tasks(long_video.parse(["--device", "cpu", "--only", "host pages"]))
    assert "needs a GPU" in found["host pages"]["host pages"]()["skipped"]


def test_what_is_seen_from_outside_becomes_figures():
    video = LongVideo(frames=200, early=10, window=2)
    # a frame takes a second, half of it on the processor; from frame 150 on twice that, and a tenth more memory
    stamps = [float(index + max(0, index - 150)) for index in range(200)]
    looks = [Sample(index + 1, 1100 if index >= 150 else 1000, 99 + stamps[index] / 2) for index in range(200)]
    # what the command does before the first mask and behind the last is no frame's
    found = figures(video, [Sample(0, 7, 0.0), *looks, Sample(200, 1100, 500.0)], stamps)
    assert found["held_bytes"] == {"early": 1000, "late": 1100, "most": 1100}
    assert found["held_growth"] == found["most_growth"] == pytest.approx(0.1)
    assert found["time_ratio"] == found["processor_ratio"] == pytest.approx(2)
    assert found["frame_processor_seconds"]["early"] == pytest.approx(0.5)


def test_the_clip_goes_there_and_back():
    assert list(LongVideo(frames=9, clip=4).indices()) == [0, 1, 2, 3, 2, 1, 0, 1, 2]


def test_a_command_that_fails_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(long_run, "prepare", lambda *_: ["python", "-c", "raise SystemExit('no room')"])
    found = long_run.track_long_video(LongVideo(frames=3), torch.device("cpu"), 1)
    assert found == {"failed": "stm track ended with code 1: no room"}


def test_wrong_options_are_one_line(capsys):
    for words, message in (
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--frames", "9"], "--frames: expected at least 700"),
        (["--only", "all"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as end:
            long_video.main(words)
        assert end.value.code == 2 and message in capsys.readouterr().err
