"""States to resume from: damage is seen before anything is deleted, and a path is the same however it is written."""

import os
import shutil

import pytest
from answers import refused
from table import files

import stm_model.tracking.resume as resume
from stm_model import Tracker
from stm_model.io import images
from stm_model.io.files import is_unchanged, write_torch


class Stop(BaseException):
    """Ends a run as nothing that is foreseen does."""


@pytest.fixture
def stopped(track, out, monkeypatch, capsys):
    """A run that stopped after six frames, with a state of it; the files there."""

    def stop(**options):
        original = Tracker.track

        def stopping(self, frames, *rest, **named):
            def six():
                for index, frame in enumerate(frames):
                    if index == 6:
                        raise Stop
                    yield frame

            return original(self, six(), *rest, **named)

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(resume, "MAX_WRITING_SHARE", float("inf"))
            patch.setattr(Tracker, "track", stopping)
            track("--save-every", "1e-9", **options)
        capsys.readouterr()
        # as a run leaves them that was resumed before, and interrupted later
        for name in ("00006.png", "00007.png"):
            shutil.copy(out / "masks" / "00005.png", out / "masks" / name)
        return files(out)

    return stop


@pytest.mark.parametrize("place", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_flipped_bit_is_seen_and_nothing_is_deleted(track, out, stopped, place):
    stopped()
    state = bytearray((out / "resume.pt").read_bytes())
    state[int(place * len(state))] ^= 1 << 3
    (out / "resume.pt").write_bytes(state)
    before = files(out)
    assert refused(track("--resume"), f"{out / 'resume.pt'}: ")
    assert files(out) == before


def test_the_checksum_covers_every_byte(tmp_path):
    path = tmp_path / "state"
    write_torch(path, {"frames": 1})
    whole = path.read_bytes()
    assert is_unchanged(path)
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not is_unchanged(path)
    for part in (b"", whole[:10], whole[:-1], whole + b"x"):
        path.write_bytes(part)
        assert not is_unchanged(path)


def test_another_frame_is_refused_before_anything_is_deleted(track, clip, out, stopped, tmp_path, monkeypatch):
    # samples of a video do not show every change of it
    monkeypatch.setattr(resume, "source_digest", lambda path: "")
    video = shutil.copytree(clip / "frames", tmp_path / "frames")
    stopped(video=video)
    shutil.copy(clip / "clip.mp4", out / "overlay.mp4")
    before = files(out)
    images.write_image(video / "00005.png", 255 - images.read_image(video / "00005.png"))
    for overlay in (False, True):
        code, _, err = track("--resume", video=video, overlay=overlay)
        assert code == 2 and "frame 5 is not the one that the state was made at" in err
        assert files(out) == before


def test_a_relative_path_is_the_same_video(track, clip, out, weights, monkeypatch):
    assert track()[0] == 0
    before = files(out)
    monkeypatch.chdir(clip.parent)
    here = os.path.relpath(clip)
    code, said, err = track(
        "--resume", video=f"{here}/clip.mp4", mask=f"{here}/mask.png", checkpoint=os.path.relpath(weights), out=out
    )
    assert (code, err) == (0, "") and "nothing is left to do" in said
    assert files(out) == before
    assert refused(track("--resume", video=clip / "frames"), "was tracked with --video")
