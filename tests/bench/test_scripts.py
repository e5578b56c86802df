"""The benchmarks of the read, training and the page, run dry: what they write, and what they refuse."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import bench.choices as choices
import bench.interactive as interactive
import bench.keys as keys
import bench.read as read
import bench.training as training
from stm_model.data.synthetic import procedural_clip
from stm_model.io.masks import write_mask
from stm_model.io.video import VideoWriter

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a process are read from Linux")
TINY = read.Size(24, 3, C=16, V=24)


def test_the_read_is_checked_timed_and_written(tmp_path, capsys):
    out = tmp_path / "deep" / "read.json"
    assert read.main(["--repeats", "2", "--threads", "1", "--out", str(out)], TINY) == 0
    report = json.loads(out.read_text())
    for dtype in read.DTYPES:
        found = report["reads"][dtype]
        assert found["error_over_allowed"] <= 1 and found["extra_bytes"]["naive"] > 24 * 72 * 4
        seconds = found["seconds"]
        assert min(times["least"] for times in seconds.values()) > 0
        for way, ratio in found["times_faster"].items():
            assert ratio == pytest.approx(seconds[f"naive, {way}"]["median"] / seconds[f"ours, {way}"]["median"])
    assert "times faster, forward:" in capsys.readouterr().out


def test_a_read_that_is_wrong_has_no_time(tmp_path, monkeypatch, capsys):
    exact = read.read_by("reference")

    def doubled(*inputs, **options):
        out, lse = exact(*inputs, **options)
        return 2 * out, lse

    monkeypatch.setattr(read, "read_by", lambda _: doubled)
    out = tmp_path / "read.json"
    assert read.main(["--repeats", "1", "--threads", "1", "--out", str(out)], TINY) == 1
    assert "error over allowed error" in json.loads(out.read_text())["reads"]["float32"]["failed"]


def test_keys_are_recorded_and_read(tmp_path, capsys):
    frames, labels = procedural_clip(9, (64, 96), 1, seed=7)
    with VideoWriter(tmp_path / "video.mp4") as writer:
        for frame in frames:
            writer.write(frame)
    write_mask(tmp_path / "mask.png", labels[0])
    file, words = str(tmp_path / "keys.1"), ["--mask", str(tmp_path / "mask.png"), "--frames", "3"]
    assert keys.main([file, "--record", str(tmp_path / "video.mp4"), *words]) == 0
    tensors = keys.read_tensors(tmp_path / "keys.1.safetensors")
    # a cell of the feature map has 16 pixels a side
    assert (
        tensors["query_key"].shape[1] == 24 and tensors["memory_key"].shape[1] == tensors["memory_value"].shape[1] == 72
    )
    assert tensors["is_l2"] and tensors["memory_key"].unique(dim=1).shape[1] > 48
    out = tmp_path / "read.json"
    assert keys.main([file, "--frames", "1", "3", "--values", "40", "--repeats", "1", "--out", str(out)]) == 0
    for found in json.loads(out.read_text())["frames"].values():
        assert set(found) == set(keys.CHOICES) and found["exact"]["largest_error"] == 0
        assert 0 <= found["skip=1e-3"]["left_out"] <= 1e-3 and found["skip=1e-3"]["largest_error"] <= 2e-3
        assert 0 < found["top_k=16"]["left_out"] < 1
    blocks_are_counted(f"{file}.safetensors", tmp_path / "blocks.json")
    for more in (["--frames", "4"], ["--record", "nowhere.mp4"], ["--record", "nowhere.mp4", *words]):
        with pytest.raises(SystemExit, match="2"):
            keys.main([file, *more])
    with pytest.raises(SystemExit, match="2"):
        keys.main([file, "--record", str(tmp_path / "video.mp4"), *words[:2], "--frames", "30"])
    assert "expected at least 32 frames, got 9" in capsys.readouterr().err


def test_choices_are_scored_as_the_memory_grows(tmp_path, capsys):
    frames, labels = procedural_clip(12, (64, 96), 1, seed=3)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for index, (frame, mask) in enumerate(zip(frames, labels)):
        Image.fromarray(frame).save(tmp_path / "images" / f"{index:05d}.png")
        write_mask(tmp_path / "masks" / f"{index:05d}.png", mask)
    folders, out = [str(tmp_path / "images"), str(tmp_path / "masks")], tmp_path / "choices.json"
    # beyond the nine frames there are, they come again
    assert choices.main([*folders, "--frames", "2", "12", "--scored", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["frames"]
    assert list(found) == ["2", "12"] and set(found["12"]) == set(read.CHOICES)
    assert found["12"]["exact"]["memory_bytes"] == found["2"]["exact"]["memory_bytes"] > 0
    for cells in found.values():
        assert cells["exact"]["J"] > 0.5 and cells["exact"]["F"] > 0.5 and cells["exact"]["seconds"] > 0
        assert cells["skip=1e-3"]["J"] == pytest.approx(cells["exact"]["J"], abs=0.01)
    (tmp_path / "masks" / "00003.png").unlink()
    with pytest.raises(SystemExit, match="2"):
        choices.main(folders)
    assert "expected a mask of each of 12 or more frames, got 11 of 12" in capsys.readouterr().err


def test_what_is_shown_again_is_changed_with_its_mask():
    image = torch.arange(600.0).reshape(1, 1, 20, 30).expand(1, 3, 20, 30) / 1200
    mask = (image[:, 0] > 0.25).float()
    first, second = itertools.islice(choices.again([(image, mask)]), 2)
    assert first[0].equal(image) and first[1].equal(mask)
    # the mask went where the pixels went: what is dark in one is 0 in the other
    assert not second[1].equal(mask) and second[0][:, 0][second[1] > 0].min() > second[0][:, 0][second[1] == 0].max()


def test_measured_memory_leaves_stderr_empty():
    """PyTorch's profiler would say there when it begins and ends; it is asked in a process that has not used it yet."""
    code = "import torch; from bench.harness import options; from stm_kernels.testing import extra_memory\n"
    code += "options(None); print(extra_memory(lambda: torch.ones(1000)))"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert int(found.stdout) >= 4000 and found.stderr == ""


def blocks_are_counted(file: str, out: Path) -> None:
    pytest.importorskip("triton")
    assert keys.main([file, "--blocks", "--frames", "3", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["frames"]["3"]
    # of 24 queries and 72 positions, in blocks of 128 × 64; the k best are in k groups of 16, or in all
    assert found["products"] == 24 * 72 and found["gathered"] == {"top_k=16": 24 * 72, "top_k=32": 24 * 72}
    for launch in found["launches"].values():
        assert launch["blocks"] == 2 and launch["tile"] == [128, 64] and launch["splits"] == 1
        for visited in launch["skip=0.001"], launch["skip=0.01"]:
            assert len(visited) == 3 and all(1 <= count <= 2 for count in visited.values())
    tensors = keys.read_tensors(file)
    del tensors["size"]
    keys.write_tensors(tensors, Path(file))
    with pytest.raises(SystemExit, match="2"):
        keys.main([file, "--blocks"])


@linux
def test_the_read_of_a_long_memory_adds_a_twentieth_of_the_naive_one():
    found = {name: training.measured(training.Case("read", name, frames=32), "cpu") for name in training.VERSIONS}
    # the affinity alone, once in float32
    assert found["naive"]["mib"] > 30 * 54 * 32 * 30 * 54 * 4 / 2**20
    assert found["fused"]["mib"] <= found["naive"]["mib"] / 20


@linux
def test_training_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "measured", lambda case, _: training.asdict(case) | {"mib": 2.0, "seconds": 1.0})
    out = tmp_path / "training.json"
    assert training.main(["--device", "cpu", "--lengths", "2", "--crop", "32", "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())["rows"]) == 6
    assert "recompute" in capsys.readouterr().out


@linux
def test_a_step_is_measured_in_a_process_of_its_own():
    for version in training.VERSIONS:
        found = training.measured(training.Case("step", version, frames=2, crop=32, recompute=True), "cpu")
        assert found["seconds"] > 0 and found["version"] == version
    with pytest.raises(SystemExit, match="training: .* failed|training: .*KeyError"):
        training.measured(training.Case("step", "other", frames=2, crop=32), "cpu")


def test_the_page_is_timed(tmp_path):
    pytest.importorskip("fastapi")
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        for frame in procedural_clip(12, (32, 48), 1, seed=0)[0]:
            writer.write(frame)
    out = tmp_path / "page.json"
    words = ["--device", "cpu", "--threads", "1", "--out", str(out)]
    assert interactive.main(["--video", str(tmp_path / "clip.mp4"), *words]) == 0
    report = json.loads(out.read_text())
    assert report["frames"] == 12 and report["round_1_s"] > 0 and report["scrub"]["measured"] == interactive.SCRUBBED


def test_a_video_that_is_not_there_is_named(tmp_path, capsys):
    pytest.importorskip("fastapi")
    assert interactive.main(["--video", str(tmp_path / "none.mp4")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("interactive: ") and "none.mp4" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "main, words, message",
    [
        (read.main, ["--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (training.main, ["--lengths", "1"], "--lengths: expected at least 2, got 1"),
        (interactive.main, [], "required: --video"),
    ],
)
def test_wrong_options_are_one_line(main, words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and message in capsys.readouterr().err
