"""`stm track --resume`: a run that was killed goes on from its last checkpoint to what an unbroken one gives."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import stm_model.tracking.resume as resume
from stm_model import STM, STMConfig, Tracker
from stm_model.commands.main import main
from stm_model.data.synthetic import procedural_clip
from stm_model.io import images
from stm_model.io.masks import write_mask
from stm_model.io.video import VideoWriter, open_video
from stm_model.network.weights import write_tensors
from stm_model.tracking import folder as folder_run

ROOT = Path(__file__).parents[2]
FRAMES = 10
TIMES = {"seconds", "fps", "peak_memory_bytes", "settings", "files"}
"""What in summary.json an unbroken run may have otherwise."""


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A folder with a tiny network, clip.mp4, the same as frames/, and masks/ of frames 0 and 6."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = STM(STMConfig("resnet18", key_channels=16, value_channels=16, decoder_channels=16))
    write_tensors(model.state_dict(), folder / "tiny.safetensors")
    frames, labels = procedural_clip(frames=FRAMES, size=(48, 80), objects=2, seed=1)
    (folder / "frames").mkdir()
    (folder / "masks").mkdir()
    with VideoWriter(folder / "clip.mp4") as writer:
        for index, frame in enumerate(frames):
            writer.write(frame)
            images.write_image(folder / "frames" / f"{index:05d}.png", frame)
    write_mask(folder / "masks" / "00000.png", np.where(labels[0] == 1, 1, 0))
    write_mask(folder / "masks" / "00006.png", labels[6])
    return folder


def arguments(clip, out, *extra, video="clip.mp4"):
    # every frame has its checkpoint, where writing one may take as long as it takes
    settings = ["--checkpoint", clip / "tiny.safetensors", "--device", "cpu", "--save-every", "1e-9"]
    return ["track", *map(str, [clip / video, "--mask", clip / "masks", "--out", out, *settings, *extra])]


@pytest.fixture
def track(clip, tmp_path, capsys, monkeypatch):
    """Run `stm track`; the exit code, stdout and stderr."""
    monkeypatch.setattr(resume, "MAX_WRITING_SHARE", float("inf"))

    def run(*extra, out=tmp_path / "out", **options):
        code = main(arguments(clip, out, *extra, **options))
        return code, *capsys.readouterr()

    return run


DYING = """
import os, signal, sys
import stm_model.tracking.resume
from stm_model import Tracker
from stm_model.commands.main import main
stm_model.tracking.resume.MAX_WRITING_SHARE = float("inf")
track, last = Tracker.track, int(sys.argv[1])
def dying(frames):
    for index, frame in enumerate(frames):
        if index == last:
            os.kill(os.getpid(), signal.SIGKILL)
        yield frame
Tracker.track = lambda self, frames, *rest, **options: track(self, dying(frames), *rest, **options)
sys.exit(main(sys.argv[2:]))
"""


def killed_at(frame: int, command: list[str]) -> None:
    """Run a command in a process of its own, which is killed as the tracker asks for a frame."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = [sys.executable, "-c", DYING, str(frame), *command]
    done = subprocess.run(process, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr


class Stop(BaseException):
    """Ends a run as nothing that is foreseen does."""


def stopped_at(frame: int, monkeypatch, run, *extra, **options) -> None:
    """The same within this process, which closes its files."""
    original = Tracker.track

    def stopping(self, frames, *rest, **named):
        def until():
            for index, picture in enumerate(frames):
                if index == frame:
                    raise Stop
                yield picture

        return original(self, until(), *rest, **named)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Tracker, "track", stopping)
        run(*extra, **options)


def files(folder: Path) -> dict[str, bytes | int]:
    """All results but the summary: the bytes of a mask, the overlay's length: encodings need not be equal."""
    found = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {
        name: open_video(file).frame_count if name == "overlay.mp4" else file.read_bytes()
        for name, file in found.items()
        if name != "summary.json"
    }


def summary(folder: Path) -> dict:
    found = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in found.items() if name not in TIMES}


def at(out: Path) -> int:
    """How many frames the checkpoint knows."""
    return torch.load(out / "resume.pt", weights_only=True)["summary"]["frames"]


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize(
    ("video", "settings", "frames"),
    [
        # the second time while it passes over what it has
        ("clip.mp4", "", (4, 2, 8)),
        # a page for each object, for eight frames of 3 × 5 positions, in the host's memory
        ("frames", "--memory every:1 --memory-budget 0 --host-budget 40KiB --eviction importance", (8,)),
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


def test_the_overlay_is_made_of_the_same_pictures(track, tmp_path, monkeypatch):
    pictures_of, write = {}, VideoWriter.write

    def spy(self, frame):
        pictures_of.setdefault(self.path.parent.name, []).append(frame)
        write(self, frame)

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


@pytest.fixture(scope="session")
def unbroken(clip, tmp_path_factory):
    """Results of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("unbroken")
    assert main(arguments(clip, out, "--no-overlay", "--skip-uncertain", "--memory", "every:2")) == 0
    return out


def test_times_are_those_of_all_runs(track, tmp_path, monkeypatch):
    stopped_at(6, monkeypatch, track)
    earlier = torch.load(tmp_path / "out" / "resume.pt", weights_only=True)["seconds"]
    assert all(value > 0 for value in earlier.values())
    earlier["wall"] += 1000
    content = torch.load(tmp_path / "out" / "resume.pt", weights_only=True)
    torch.save(content | {"seconds": earlier}, tmp_path / "out" / "resume.pt")
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
    assert code == 2 and "was tracked with --memory every:5, now it is first" in err and err.count("\n") == 1


OTHER_RESULTS = {
    "memory": "first",
    "size": "32",
    "dtype": "float16",
    "compile": None,
    "memory-budget": "1MiB",
    "host-budget": "1MiB",
    "eviction": "importance",
    "skip-uncertain": None,
    "top-k": "5",
    "skip": "0.1",
    "binary": None,
    "resize-mask": None,
}


def test_a_finished_run_is_no_result_of_other_settings(track, clip, tmp_path):
    assert track("--no-overlay")[0] == 0
    before = files(tmp_path / "out")

    def refused(name, *extra, **options):
        code, out, err = track("--resume", *extra, **options)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert err.startswith(f"stm: error: {tmp_path / 'out'}: was tracked with --{name} ") and "--overwrite" in err

    for name, value in OTHER_RESULTS.items():
        refused(name, "--no-overlay", f"--{name}", *([value] if value else []))
    refused("overlay")
    refused("mask", "--no-overlay", "--mask", clip / "masks" / "00006.png")
    refused("checkpoint", "--no-overlay", "--checkpoint", clip / "other.safetensors")
    refused("video", "--no-overlay", video="frames")
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("stopped", ["unfinished", "interrupted", None])
def test_a_folder_of_an_earlier_version_is_refused(track, tmp_path, stopped):
    """Its masks and its state stay as they are, whether or not it was finished."""
    assert track("--no-overlay")[0] == 0
    file = tmp_path / "out" / "summary.json"
    old = json.loads(file.read_text()) | {"stopped": stopped}
    del old["format"]
    file.write_text(json.dumps(old))
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"as it was called")
    before = files(tmp_path / "out")
    code, out, err = track("--resume", "--no-overlay")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"stm: error: {tmp_path / 'out'}: was written by another version (format 1 instead of 2)")
    assert "--overwrite" in err and files(tmp_path / "out") == before
    assert track("--overwrite", "--no-overlay")[0] == 0 and json.loads(file.read_text())["format"] == 2


@pytest.mark.parametrize("change", [{"format": None}, {"format": 1}, {"format": 3}])
def test_a_state_of_another_version_is_refused(track, tmp_path, monkeypatch, capsys, change):
    stopped_at(4, monkeypatch, track)
    capsys.readouterr()
    file = tmp_path / "out" / "resume.pt"
    torch.save(torch.load(file, weights_only=True) | change, file)
    before = files(tmp_path / "out")
    code, out, err = track("--resume")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"stm: error: {file}: was written by another version (format {change['format'] or 1} instead")
    assert files(tmp_path / "out") == before


OTHER = {
    "memory": (["--memory", "first"], "memory: first instead of the every:5 that the saved state was made with"),
    "size": (["--size", "32"], "size: 32 instead of the None"),
    "skip": (["--skip", "0.1"], "skip: 0.1 instead of the 0.0"),
    "budget": (["--memory-budget", "1MiB"], "device budget: 1048576 instead of the None"),
    "dtype": (["--dtype", "float16"], "dtype: torch.float16 instead of the torch."),
}


def test_a_run_with_other_settings_is_refused_by_name(track, clip, tmp_path, monkeypatch, capsys):
    stopped_at(4, monkeypatch, track)
    capsys.readouterr()
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files(tmp_path / "out")}

    def refused(*extra, words, **options):
        code, out, err = track("--resume", *extra, **options)
        assert code == 2 and err.startswith(f"stm: error: {words}") and err.count("\n") == 1, err
        assert out == "", "nothing is announced that is refused then"
        assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files(tmp_path / "out")} == before

    for settings, words in OTHER.values():
        refused(*settings, words=words)
    refused(video="frames", words="video: not those that the saved state was made with")
    model = STM(STMConfig("resnet18", key_channels=16, value_channels=16, decoder_channels=16))
    write_tensors(model.state_dict(), tmp_path / "other.safetensors")
    refused("--checkpoint", tmp_path / "other.safetensors", words="weights: not those that")
    refused("--mask", clip / "masks" / "00006.png", words="masks: not those that")
    refused("--overwrite", words="--resume goes on with what --overwrite replaces; choose one of them")
    mask = tmp_path / "out" / "masks" / "00002.png"
    mask.rename(tmp_path / "mask.png")
    before.pop("masks/00002.png")
    refused(words=f"{mask}: is gone, without it the run can't go on")
    (tmp_path / "mask.png").rename(mask)
    # what the result does not depend on may change
    assert track("--resume", "--no-overlay", "--save-every", "0")[0] == 0
    assert not (tmp_path / "out" / "overlay.mp4").exists()


@pytest.mark.parametrize("content", [b"", b"text", "cut", "list"])
def test_what_is_no_state_is_refused(track, tmp_path, monkeypatch, content):
    stopped_at(4, monkeypatch, track)
    file = tmp_path / "out" / "resume.pt"
    if content == "list":
        torch.save([1, 2], file)
    else:
        file.write_bytes(file.read_bytes()[:-5000] if content == "cut" else content)
    code, _, err = track("--resume")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith(f"stm: error: {file}: can't be read as a state to resume from")
    assert track("--overwrite", "--save-every", "0")[0] == 0 and not file.exists()


def test_a_folder_with_something_else_is_refused(track, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, out, err = track("--resume")
    assert (code, out) == (2, "") and "holds something other than results" in err and err.count("\n") == 1
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]
    code, _, err = track("--save-every", "-1", out=tmp_path / "other")
    assert code == 2 and err == "stm: error: save_every: expected at least 0 seconds, got -1.0\n"


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
    checkpoint = resume.ResumeFile(tmp_path / "resume.pt", 1, tmp_path / "video")
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
    checkpoint = resume.ResumeFile(tmp_path / "resume.pt", 60, tmp_path / "video")
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
    never = resume.ResumeFile(tmp_path / "resume.pt", 0, tmp_path / "video")
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
