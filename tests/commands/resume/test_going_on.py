"""`stm track --resume`: a run that was killed goes on from its last checkpoint to what an unbroken one gives."""

import contextlib
import json
import os

import numpy as np
import pytest
import torch
from stopping import FRAMES, arguments, at, files, killed_at, stopped_at, summary

import stm_model.tracking.resume as resume
from stm_model import Tracker
from stm_model.commands.main import main
from stm_model.io.files import write_torch
from stm_model.io.masks import write_mask
from stm_model.io.overlay import Overlay
from stm_model.io.video import VideoWriter
from stm_model.tracking import folder as folder_run


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize(
    ("video", "settings", "frames"),
    [
        # the second time while it passes over what it has
        ("clip.mp4", "", (4, 2, 8)),
        # a page for each object, for eight frames of 3 × 5 positions, in the host's memory
        ("frames", "--memory every:1 --memory-budget 0 --host-budget 40KiB --eviction use", (8,)),
    ],
)
def test_a_run_that_was_killed_gives_what_an_unbroken_one_gives(track, clip, tmp_path, video, settings, frames):
    settings = [*settings.split(), "--dtype", "float32"]
    for turn, frame in enumerate(frames):
        killed_at(frame, arguments(clip, tmp_path / "out", "--resume", *settings, video=video))
        assert at(tmp_path / "out") == max(frames[: turn + 1])
        assert len(list((tmp_path / "out" / "masks").glob("0*.png"))) == max(frames[: turn + 1])
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["stopped"] == "unfinished"
    code, out, err = track("--resume", *settings, video=video)
    assert (code, err) == (0, "") and "goes on     after 8 frames" in out
    assert track(*settings, video=video, out=tmp_path / "unbroken")[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")
    assert sorted(files(tmp_path / "out")) == [*(f"masks/{index:05d}.png" for index in range(FRAMES)), "overlay.mp4"]
    assert summary(tmp_path / "out") == summary(tmp_path / "unbroken")
    assert files(tmp_path / "out")["overlay.mp4"] == FRAMES


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize("settings", ["", "--both-ways"])
def test_a_run_that_encodes_ahead_goes_on(track, clip, tmp_path, encodes_ahead, settings):
    settings = [*settings.split(), "--dtype", "float32"]
    command = arguments(clip, tmp_path / "out", "--resume", *settings)
    # one frame has been taken that is not tracked; the pass backwards has seven
    for frame in (5, 9):
        killed_at(frame, command)
    assert at(tmp_path / "out") == 8
    code, out, err = track("--resume", *settings)
    assert (code, err) == (0, "") and "goes on     after 8 frames" in out
    assert track(*settings, out=tmp_path / "unbroken")[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")
    assert summary(tmp_path / "out") == summary(tmp_path / "unbroken")


def test_masks_lie_on_their_own_frames_where_these_are_encoded_ahead(track, clip, tmp_path, monkeypatch, request):
    drawn, draw = {}, Overlay.draw

    def spy(self, frame, labels):
        drawn.setdefault(name, []).append(frame)
        return draw(self, frame, labels)

    monkeypatch.setattr(Overlay, "draw", spy)
    for name in ("one by one", "ahead"):
        assert track(out=tmp_path / name)[0] == 0
        request.getfixturevalue("encodes_ahead")
    np.testing.assert_array_equal(drawn["ahead"], drawn["one by one"])


def test_the_overlay_is_made_of_the_same_pictures(track, tmp_path, monkeypatch):
    pictures_of, write = {}, VideoWriter.write

    def spy(self, frame, *time):
        pictures_of.setdefault(self.path.parent.name, []).append(frame)
        write(self, frame, *time)

    stopped_at(5, monkeypatch, track)
    monkeypatch.setattr(VideoWriter, "write", spy)
    assert track("--resume")[0] == 0 and track(out=tmp_path / "unbroken")[0] == 0
    assert len(pictures_of["out"]) == FRAMES
    np.testing.assert_array_equal(pictures_of["out"], pictures_of["unbroken"])


@pytest.mark.parametrize("frame", range(1, FRAMES))
def test_it_goes_on_from_any_frame(track, tmp_path, monkeypatch, frame, unbroken):
    settings = ("--no-overlay", "--skip-uncertain", "--memory", "every:2")
    stopped_at(frame, monkeypatch, track, *settings)
    assert at(tmp_path / "out") == frame
    # what a killed run left of later frames, and of files that it was writing
    (tmp_path / "out" / "masks" / "00099.png").write_bytes(b"")
    (tmp_path / "out" / "masks" / ".00009.partial.png").write_bytes(b"")
    assert track("--resume", *settings)[0] == 0
    assert files(tmp_path / "out") == files(unbroken) and summary(tmp_path / "out") == summary(unbroken)


@pytest.mark.parametrize("video", ["clip.mp4", "frames"])
def test_a_part_goes_on(track, tmp_path, monkeypatch, video):
    part = ("--stride", "2", "--end", "9", "--crop", "0,0,72,48")
    stopped_at(3, monkeypatch, track, *part, video=video)
    assert at(tmp_path / "out") == 3
    assert track("--resume", *part, video=video)[0] == 0
    assert track(*part, video=video, out=tmp_path / "unbroken")[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "unbroken") and files(tmp_path / "out")["overlay.mp4"] == 5
    assert summary(tmp_path / "out") == summary(tmp_path / "unbroken")


def test_times_are_those_of_all_runs(track, tmp_path, monkeypatch):
    stopped_at(6, monkeypatch, track)
    earlier = torch.load(tmp_path / "out" / "resume.pt", weights_only=True)["seconds"]
    assert all(value > 0 for value in earlier.values())
    earlier["wall"] += 1000
    content = torch.load(tmp_path / "out" / "resume.pt", weights_only=True)
    write_torch(tmp_path / "out" / "resume.pt", content | {"seconds": earlier})
    assert track("--resume")[0] == 0
    now = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 1000 < now["seconds"]["wall"] < 1100
    assert all(now["seconds"][name] > value for name, value in earlier.items())
    assert now["fps"] == pytest.approx(FRAMES / now["seconds"]["tracking"])


def test_what_is_finished_is_left_as_it_is(track, tmp_path):
    assert track("--resume")[0] == 0  # with nothing to go on from it starts
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files(tmp_path / "out")}
    (tmp_path / "out" / "resume.pt").write_bytes(b"left by a run that was killed at its very end")
    code, out, err = track("--resume")
    assert (code, err) == (0, "") and out.startswith(f"{FRAMES} frames are tracked and in {tmp_path / 'out'}: nothing")
    code, out, err = track("--resume", "--json")
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files(tmp_path / "out")} == before
    code, out, err = track("--resume", "--memory", "first")
    assert code == 2 and "was tracked with --memory None, now it is first" in err and err.count("\n") == 1


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Files that may not grow beyond a size fail as on a full disk: in the midst of being written."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_leaves_the_checkpoint_before(track, tmp_path, monkeypatch):
    settings = ("--memory", "every:1", "--dtype", "float32")
    stopped_at(5, monkeypatch, track, *settings, out=tmp_path / "measured")
    with files_of_at_most((tmp_path / "measured" / "resume.pt").stat().st_size):
        code, out, err = track(*settings)
    assert code == 2 and err.startswith(f"stm: error: {tmp_path / 'out' / 'resume.pt'}: File too large"), err
    assert err.endswith(f"; the masks of 6 frames are kept in {tmp_path / 'out'}; --resume goes on\n")
    assert err.count("\n") == 1 and at(tmp_path / "out") == 5 and not list((tmp_path / "out").glob(".*"))
    assert track("--resume", *settings)[0] == 0 and track(*settings, out=tmp_path / "unbroken")[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")


def test_wherever_writing_a_checkpoint_fails_the_one_before_stays(tmp_path):
    (tmp_path / "video").write_bytes(b"video")
    checkpoint = resume.ResumeFile(tmp_path / "resume.pt", 1, tmp_path / "video", {})
    checkpoint.write({"number": 1})
    before = (tmp_path / "resume.pt").read_bytes()
    content = {"number": 2, "tensors": [torch.zeros(size) for size in (30000, 3, 5000)]}
    torch.save(content, tmp_path / "whole.pt")
    for size in range(100, (tmp_path / "whole.pt").stat().st_size, 10000):
        with files_of_at_most(size), pytest.raises(OSError, match=f"File too large: '{checkpoint.path}'"):
            checkpoint.write(content)
        assert (tmp_path / "resume.pt").read_bytes() == before and not list(tmp_path.glob(".*"))
    checkpoint.write(content)
    assert checkpoint.read()["number"] == 2


def test_a_disk_that_is_full_of_masks_leaves_a_checkpoint_of_whole_masks(track, tmp_path, monkeypatch):
    write = write_mask

    def until_full(path, labels):
        with files_of_at_most(50) if path.name == "00005.png" else contextlib.nullcontext():
            write(path, labels)

    with monkeypatch.context() as patch:
        patch.setattr(folder_run, "write_mask", until_full)
        code, _, err = track()
    full = tmp_path / "out" / "masks" / "00005.png"
    assert code == 2 and err.startswith(f"stm: error: {full}: File too large; the masks of 5 frames are kept")
    assert at(tmp_path / "out") == 5 and not full.exists()
    assert track("--resume")[0] == 0 and track(out=tmp_path / "unbroken")[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")


def test_a_list_goes_on_with_a_video_that_is_half_done(track, clip, tmp_path, monkeypatch, capsys):
    listed = tmp_path / "list.txt"
    listed.write_text(f"{clip}/clip.mp4 {clip}/masks one\n")
    settings = ["--checkpoint", clip / "tiny.safetensors", "--device", "cpu", "--save-every", "1e-9"]
    command = ["track", *map(str, [listed, "--out", tmp_path / "out", *settings])]
    stopped_at(7, monkeypatch, lambda: main(command))
    capsys.readouterr()
    assert at(tmp_path / "out" / "one") == 7
    asked = []
    original = Tracker.track
    monkeypatch.setattr(
        Tracker,
        "track",
        lambda self, *rest, resume, **named: asked.append(resume) or original(self, *rest, resume=resume, **named),
    )
    # with other settings it is refused, as what is done would be
    assert main([*command, "--memory", "first"]) == 2
    assert "one: memory: first instead of the every:5" in capsys.readouterr().err
    assert main(command) == 0 and [content["video"]["index"] for content in asked] == [6, 6]
    assert track(out=tmp_path / "unbroken")[0] == 0
    assert files(tmp_path / "out" / "one") == files(tmp_path / "unbroken")


def test_writing_takes_its_share_of_the_time_at_most(tmp_path, monkeypatch):
    (tmp_path / "video").write_bytes(b"video")
    now, took = [0.0], 3.0
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch, "save", lambda content, file: now.__setitem__(0, now[0] + took))
    checkpoint = resume.ResumeFile(tmp_path / "resume.pt", 60, tmp_path / "video", {})
    written = []
    while now[0] < 2000:
        if checkpoint.due():
            written.append(now[0])
            checkpoint.write({})
        now[0] += 1
    assert written[0] == 60 and set(np.diff(written)) == {took + took / resume.MAX_WRITING_SHARE}
    took = 0.0
    checkpoint.write({})
    now[0] += 59
    assert not checkpoint.due()
    now[0] += 1
    assert checkpoint.due()
    never = resume.ResumeFile(tmp_path / "resume.pt", 0, tmp_path / "video", {})
    now[0] += 10**6
    assert not never.due()


def test_a_video_is_known_again_by_its_content(tmp_path):
    content = bytes(np.random.default_rng(0).integers(0, 256, 5 * resume.SAMPLE, dtype=np.uint8))
    digests = set()
    for number, place in enumerate([None, 0, len(content) // 2, -1]):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        (tmp_path / f"video{number}").write_bytes(changed)
        digests.add(resume.source_digest(tmp_path / f"video{number}"))
    assert len(digests) == 4
    (tmp_path / "video0").rename(tmp_path / "other")
    assert resume.source_digest(tmp_path / "other") in digests
    (tmp_path / "frames").mkdir()
    for name, content in (("1.png", b"a"), ("2.png", b"b"), ("2.png", b"c"), ("3.png", b"c")):
        (tmp_path / "frames" / name).write_bytes(content)
        digests.add(resume.source_digest(tmp_path / "frames"))
    assert len(digests) == 8
