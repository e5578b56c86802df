"""`stm track LIST`: many videos by one command, on one process or several, in one go or several."""

import json
import os
import subprocess
import sys
from pathlib import Path

import answers
import numpy as np
import pytest
import torch
from answers import refused

from stm_model import STM, STMConfig
from stm_model.commands.batch import read_list
from stm_model.commands.main import main
from stm_model.data.synthetic import procedural_clip
from stm_model.io.masks import read_mask, write_mask
from stm_model.io.video import VideoWriter, open_video
from stm_model.network.weights import write_tensors
from stm_model.tracking.resume import FORMAT

ROOT = Path(__file__).parents[2]
LENGTHS = {"ant": 4, "bee": 7, "cat": 5}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny network, three clips with masks, and the list of them."""
    folder = tmp_path_factory.mktemp("videos")
    torch.manual_seed(0)
    model = STM(STMConfig("resnet18", key_channels=16, value_channels=16, decoder_channels=16))
    write_tensors(model.state_dict(), folder / "tiny.safetensors")
    (folder / "clips").mkdir()
    for seed, (name, length) in enumerate(LENGTHS.items()):
        frames, labels = procedural_clip(frames=length, size=(48, 64), objects=1, seed=seed)
        with VideoWriter(folder / "clips" / f"{name}.mp4") as writer:
            for frame in frames:
                writer.write(frame)
        write_mask(folder / f"{name}.png", labels[0])
    lines = [f"clips/{name}.mp4 {name}.png" for name in LENGTHS]
    (folder / "list.txt").write_text("# VIDEO MASK\n\n" + "  # of an animal\n".join(lines) + "\n")
    return folder


@pytest.fixture
def track(folder, tmp_path, capsys):
    """Run `stm track LIST`; the exit code, stdout and stderr."""

    def run(*extra, listed=folder / "list.txt", out=tmp_path / "out"):
        code = main(_arguments(folder, listed, out, *extra))
        return code, *capsys.readouterr()

    return run


def _arguments(folder, listed, out, *extra):
    settings = ["--checkpoint", folder / "tiny.safetensors", "--dtype", "float32", "--device", "cpu"]
    return ["track", *map(str, [listed, "--out", out, *settings, *extra])]


def _with_a_broken_video(folder, tmp_path):
    """A list of the three and of one that is no video."""
    (tmp_path / "broken.mp4").write_text("no video")
    rows = [f"'{folder}/clips/{name}.mp4' '{folder}/{name}.png'" for name in LENGTHS]
    (tmp_path / "list.txt").write_text("\n".join([rows[0], f"broken.mp4 {folder}/ant.png dog", *rows[1:]]))
    return tmp_path / "list.txt"


def _states(out):
    return {name: row["state"] for name, row in json.loads((out / "summary.json").read_text())["videos"].items()}


def _written(out):
    return {file.relative_to(out): file.stat().st_mtime_ns for file in out.glob("*/masks/*.png")}


def test_a_list_is_tracked_as_each_video_alone(track, folder, tmp_path, capsys):
    code, out, err = track("--json")
    assert (code, err) == (0, "")
    summary = json.loads(out)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["done"], summary["failed"], summary["frames"], summary["stopped"]) == (3, 0, 16, None)
    assert {name: row["frames"] for name, row in summary["videos"].items()} == LENGTHS
    assert all(row["fps"] > 0 and row["state"] == "done" for row in summary["videos"].values())
    alone = _arguments(folder, folder / "clips" / "bee.mp4", tmp_path / "alone", "--mask", folder / "bee.png")
    assert main(alone) == 0
    files = sorted(file.relative_to(tmp_path / "alone") for file in (tmp_path / "alone").rglob("*") if file.is_file())
    assert len(files) == LENGTHS["bee"] + 2  # masks, overlay, summary
    ours = tmp_path / "out" / "bee"
    assert files == sorted(file.relative_to(ours) for file in ours.rglob("*") if file.is_file())
    for file in files[: LENGTHS["bee"]]:
        assert (ours / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    assert open_video(ours / "overlay.mp4").frame_count == LENGTHS["bee"]


def test_the_longest_comes_first(track, monkeypatch):
    import stm_model.commands.batch as batch

    order, original = [], batch.track_video
    monkeypatch.setattr(
        batch,
        "track_video",
        lambda config, *rest, **named: order.append(config.video.stem) or original(config, *rest, **named),
    )
    assert track()[0] == 0
    assert order == ["bee", "cat", "ant"]


def test_a_failed_video_stops_no_other_and_is_tried_again(track, folder, tmp_path):
    listed = _with_a_broken_video(folder, tmp_path)
    code, out, err = track(listed=listed)
    assert code == 2
    assert (
        err.startswith("stm: error: dog: ") and "broken.mp4: does not open as a video" in err and err.count("\n") == 1
    )
    assert "3 of 4 videos done, 1 failed" in out
    assert _states(tmp_path / "out") == {"ant": "done", "dog": "failed", "bee": "done", "cat": "done"}
    before = _written(tmp_path / "out")
    (tmp_path / "broken.mp4").write_bytes((folder / "clips" / "ant.mp4").read_bytes())
    code, out, err = track("--json", listed=listed)
    videos = json.loads(out)["videos"]
    assert (code, err) == (0, "")
    assert [name for name, row in videos.items() if row["earlier"]] == ["ant", "bee", "cat"]
    assert videos["dog"]["frames"] == LENGTHS["ant"] and videos["bee"]["frames"] == LENGTHS["bee"]
    after = _written(tmp_path / "out")
    assert before.items() <= after.items() and len(after) == len(before) + LENGTHS["ant"]


def test_other_settings_are_refused_by_name(track, tmp_path):
    assert track()[0] == 0
    before = _written(tmp_path / "out")
    code, out, err = track("--memory", "first")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "ant: was tracked with --memory None, now it is first" in err and "--overwrite" in err
    assert _written(tmp_path / "out") == before
    assert track("--memory", "first", "--overwrite")[0] == 0
    after = _written(tmp_path / "out")
    assert before.keys() == after.keys() and all(before[file] < after[file] for file in before)
    assert track("--memory", "first")[0] == 0 and _written(tmp_path / "out") == after


def test_another_video_of_the_name_is_refused(track, folder, tmp_path):
    assert track()[0] == 0
    (tmp_path / "other.txt").write_text(f"{folder}/clips/bee.mp4 {folder}/ant.png ant")
    code, _, err = track(listed=tmp_path / "other.txt")
    assert code == 2 and "ant: was tracked with --video" in err and "bee.mp4" in err


def test_results_of_an_earlier_version_are_refused_by_name(track, tmp_path):
    assert track()[0] == 0
    file = tmp_path / "out" / "bee" / "summary.json"
    file.write_text(
        json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "format"})
    )
    before = _written(tmp_path / "out")
    versions = f"(format 1 instead of {FORMAT})"
    assert refused(track(), f"{tmp_path / 'out' / 'bee'}: was written by another version {versions}")
    assert _written(tmp_path / "out") == before
    assert track("--overwrite")[0] == 0


@pytest.mark.parametrize("small, size", [(0.0, 32), (1.0, 40)])
def test_the_size_of_the_default_weights_is_the_same_setting(tmp_path, folder, monkeypatch, small, size):
    """Asked for nothing, frames are seen at the size of the weights, or at that for small objects; that is no other
    setting the next time."""
    monkeypatch.setattr("stm_model.network.stm.DEFAULT_WEIGHTS", folder / "tiny.safetensors")
    monkeypatch.setattr("stm_model.runtime.USUAL_SIZE", 32)
    monkeypatch.setattr("stm_model.runtime.CLOSE_SIZE", 40)
    monkeypatch.setattr("stm_model.runtime.SMALL", small)
    command = ["track", str(folder / "list.txt"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(command) == 0
    assert min(json.loads((tmp_path / "out" / "ant" / "summary.json").read_text())["network_size"]) == size
    before = _written(tmp_path / "out")
    assert main(command) == 0 and _written(tmp_path / "out") == before
    assert main([*command, "--size", "48"]) != 0 and _written(tmp_path / "out") == before


def test_a_folder_with_something_else_is_refused(track, tmp_path):
    (tmp_path / "out" / "bee").mkdir(parents=True)
    (tmp_path / "out" / "bee" / "notes.txt").write_text("mine")
    code, out, err = track()
    assert (code, out) == (2, "") and "holds something other than results of a list" in err
    (tmp_path / "out" / "summary.json").write_text('{"command": "track list"}')
    code, out, err = track()
    assert (code, out) == (2, "") and "bee: holds something other than results" in err
    assert track("--overwrite")[0] == 0
    assert (tmp_path / "out" / "bee" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.mp4 a.png\nb.mp4\n", "line 2: expected VIDEO MASK [NAME]"),
        ("a.mp4 a.png a b # c", "line 1: expected VIDEO MASK [NAME] (quotes around spaces), got 4 words"),
        ("\n'a.mp4 a.png", "line 2: No closing quotation"),
        ("a.mp4 a.png\n# b\nc/a.mp4 c.png", "line 3: a is the name of line 1"),
        ("a.mp4 a.png ../b", "line 1: expected the name of a folder among the results, got '../b'"),
        ("a.mp4 a.png ..", "line 1: expected the name of a folder"),
        ("a.mp4 a.png summary.json", "line 1: expected the name of a folder"),
        ("# nothing\n", "expected at least one video"),
    ],
)
def test_a_malformed_list_is_one_line(track, tmp_path, text, words):
    (tmp_path / "list.txt").write_text(text)
    code, out, err = track(listed=tmp_path / "list.txt")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert str(tmp_path / "list.txt") in err and words in err
    assert not (tmp_path / "out").exists()


def test_what_is_no_list_asks_for_a_mask(track, folder, tmp_path):
    for video in (folder / "clips" / "ant.mp4", folder / "clips"):
        code, _, err = track(listed=video)
        assert code == 2 and "expected a text file that lists videos; a single video needs its --mask" in err
    code, _, err = track(listed=tmp_path / "gone.txt")
    assert code == 2 and "gone.txt: No such file" in err
    for wrong in (["--memory", "sometimes"], ["--checkpoint", tmp_path / "gone.pth"], ["--top-k", "0"]):
        code, _, err = track(*wrong)
        assert code == 2 and err.count("\n") == 1 and "dog" not in err
    assert not (tmp_path / "out").exists()


def test_quotes_comments_and_names_of_a_list(tmp_path):
    (tmp_path / "frames.v2").mkdir()
    text = "\ufeff'my clip#1.mp4' m.png # don't\nframes.v2 m.png\n/x/y.mkv masks z\n"
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    found = {row.name: (row.video, row.mask) for row in read_list(tmp_path / "list.txt")}
    assert found == {
        "my clip#1": (tmp_path / "my clip#1.mp4", tmp_path / "m.png"),
        "frames.v2": (tmp_path / "frames.v2", tmp_path / "m.png"),
        "z": (Path("/x/y.mkv"), tmp_path / "masks"),
    }


def _manifest(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_the_manifest_has_a_line_for_each_video_as_it_ends(track, folder, tmp_path):
    listed = _with_a_broken_video(folder, tmp_path)
    assert track(listed=listed)[0] == 2
    lines = _manifest(tmp_path / "out")
    assert {line["name"]: (line["state"], line["frames"]) for line in lines} == {
        "ant": ("done", 4),
        "bee": ("done", 7),
        "cat": ("done", 5),
        "dog": ("failed", 0),
    }
    (dog,) = (line for line in lines if line["name"] == "dog")
    assert dog["video"] == str(tmp_path / "broken.mp4") and "does not open as a video" in dog["reason"]
    # what is done already has its line; what fails again gets another
    assert track(listed=listed)[0] == 2
    assert _manifest(tmp_path / "out")[:4] == lines
    assert [line["name"] for line in _manifest(tmp_path / "out")[4:]] == ["dog"]


def test_two_shards_at_once_share_a_folder(track, folder, tmp_path):
    listed = _with_a_broken_video(folder, tmp_path)
    command = [*answers.STM, *_arguments(folder, listed, tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    jobs = [
        subprocess.Popen([*command, "--shard", f"{job}/2"], env=environment, stderr=subprocess.PIPE, text=True)
        for job in (1, 2)
    ]
    said = [job.communicate(timeout=300)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 2], said
    assert "stm: error: dog: " in said[1]
    found = {line["name"]: (line["shard"], line["state"]) for line in _manifest(tmp_path / "out")}
    assert found == {"ant": ("1/2", "done"), "bee": ("1/2", "done"), "dog": ("2/2", "failed"), "cat": ("2/2", "done")}
    for job, names in ((1, {"ant", "bee"}), (2, {"dog", "cat"})):
        summary = json.loads((tmp_path / "out" / f"summary-{job}-of-2.json").read_text())
        assert summary["videos"].keys() == names
    # a run of the whole list finds their work
    before = _written(tmp_path / "out")
    assert track(listed=listed)[0] == 2 and _written(tmp_path / "out") == before
    assert track("--shard", "9/9")[0] == 0, "more jobs than videos"


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2", "1/0"])
def test_a_shard_that_makes_no_sense_is_refused(track, tmp_path, text):
    code, out, err = track(f"--shard={text}")
    assert (code, out) == (
        2,
        "",
    ) and err == f"stm: error: --shard: expected i/n with i from 1 to n, as 2/8, got {text}\n"
    assert not (tmp_path / "out").exists()


# run as the user does

KILLED = """
import os, signal, sys
# tests that were started in the background of a shell ignore it, and their children would too
signal.signal(signal.SIGINT, signal.default_int_handler)
from stm_model import Tracker
from stm_model.commands.main import main
track = Tracker.track
def dying(self, frames, masks, frame_count, **options):
    for result in track(self, frames, masks, frame_count, **options):
        if frame_count == 5 and result.index == 3:
            os.kill(os.getpid(), signal.{signal})
        yield result
Tracker.track = dying
sys.exit(main(sys.argv[1:]))
"""


def _run(*command):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_a_run_that_was_stopped_goes_on(track, folder, tmp_path, name):
    """It dies in the second of three videos; the same command does that one anew and the third."""
    done = _run("-c", KILLED.format(signal=name), *_arguments(folder, folder / "list.txt", tmp_path / "out"))
    expected = {"SIGINT": (130, "interrupted"), "SIGTERM": (143, "interrupted"), "SIGKILL": (-9, "unfinished")}[name]
    assert done.returncode == expected[0], done.stderr
    said = f"stm: error: interrupted; what is done is kept in {tmp_path / 'out'}, and the same command goes on\n"
    assert done.stderr.endswith("" if name == "SIGKILL" else said) and "Traceback" not in done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["stopped"] == expected[1] and summary["videos"]["cat"]["state"] == "unfinished"
    assert json.loads((tmp_path / "out" / "bee" / "summary.json").read_text())["stopped"] is None
    assert json.loads((tmp_path / "out" / "cat" / "summary.json").read_text())["stopped"] == expected[1]
    assert not (tmp_path / "out" / "ant").exists()
    before = _written(tmp_path / "out")
    code, out, err = track("--json")
    assert (code, err) == (0, "") and set(_states(tmp_path / "out").values()) == {"done"}
    assert [name for name, row in json.loads(out)["videos"].items() if row["earlier"]] == ["bee"]
    after = _written(tmp_path / "out")
    assert all(after[file] == time for file, time in before.items() if file.parts[0] == "bee")
    assert track(out=tmp_path / "unbroken")[0] == 0
    assert not list((tmp_path / "out").rglob(".*")) and after.keys() == _written(tmp_path / "unbroken").keys()
    for file in after:
        np.testing.assert_array_equal(read_mask(tmp_path / "out" / file), read_mask(tmp_path / "unbroken" / file))


def test_two_ranks_share_a_list(track, folder, tmp_path):
    listed = _with_a_broken_video(folder, tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "stm_model"]
    done = _run(*launcher, *_arguments(folder, listed, tmp_path / "two"))
    assert done.returncode != 0 and done.stderr.count("stm: error: ") == 1
    assert "stm: error: dog: " in done.stderr and "broken.mp4: does not open as a video" in done.stderr
    assert done.stdout.count("3 of 4 videos done, 1 failed") == 1
    assert _states(tmp_path / "two") == {"ant": "done", "dog": "failed", "bee": "done", "cat": "done"}
    videos = json.loads((tmp_path / "two" / "summary.json").read_text())["videos"]
    assert {name: row["rank"] for name, row in videos.items()} == {"bee": 0, "cat": 1, "ant": 1, "dog": 0}
    assert track(listed=listed)[0] == 2
    one, two = _written(tmp_path / "out"), _written(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 16
    for file in one:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    # the work of both is known to the next run, whatever its number of ranks
    listed.write_text("\n".join(line for line in listed.read_text().splitlines() if "dog" not in line))
    done = _run(*launcher, *_arguments(folder, listed, tmp_path / "two", "--json"))
    assert done.returncode == 0, done.stderr
    assert all(row["earlier"] for row in json.loads(done.stdout)["videos"].values())
    assert _written(tmp_path / "two") == two
