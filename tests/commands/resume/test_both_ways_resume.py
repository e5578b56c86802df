"""`stm track --both-ways`: killed in either pass it goes on to what an unbroken run gives."""

import json
import os
import shutil

import numpy as np
import pytest
from stopping import FRAMES, arguments, files, killed_at, stopped_at, summary

from stm_model.commands.main import main
from stm_model.io.masks import read_mask

SETTINGS = ("--both-ways", "--no-overlay", "--dtype", "float32")


@pytest.fixture(scope="module")
def whole(clip, tmp_path_factory):
    """Results of a run both ways that nothing stopped; the last mask is for frame 6."""
    out = tmp_path_factory.mktemp("both")
    assert main(arguments(clip, out, *SETTINGS)) == 0
    return out


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_killed_in_both_passes(track, clip, tmp_path, whole):
    # the pass backwards has seven frames
    for frame in (4, 5, 8, 9):
        killed_at(frame, arguments(clip, tmp_path / "out", "--resume", *SETTINGS))
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["stopped"] == "unfinished"
    code, out, err = track("--resume", *SETTINGS)
    assert (code, err) == (0, "") and "goes on     after 9 frames" in out
    assert files(tmp_path / "out") == files(whole) and summary(tmp_path / "out") == summary(whole)
    assert sorted(files(whole)) == [f"masks/{index:05d}.png" for index in range(FRAMES)]


@pytest.mark.parametrize("frame", range(1, 7))
def test_it_goes_on_from_any_frame_of_the_pass_backwards(track, tmp_path, monkeypatch, frame, whole):
    stopped_at(frame, monkeypatch, track, *SETTINGS)
    assert len(list((tmp_path / "out" / "backward").glob("*.npz"))) == frame
    assert track("--resume", *SETTINGS)[0] == 0
    assert files(tmp_path / "out") == files(whole)


def test_it_differs_from_one_way(track, tmp_path, whole):
    assert track("--no-overlay", "--dtype", "float32")[0] == 0
    one_way, both = (
        [read_mask(folder / "masks" / f"{index:05d}.png") for index in range(FRAMES)]
        for folder in (tmp_path / "out", whole)
    )
    assert all(np.array_equal(one_way[index], both[index]) for index in (0,))
    assert any(not np.array_equal(one_way[index], both[index]) for index in range(1, 6))
    code, _, err = track("--resume", *SETTINGS)
    assert code == 2 and "was tracked with --both-ways False, now it is True" in err


def test_a_state_of_other_settings_is_refused(track, tmp_path, monkeypatch):
    stopped_at(5, monkeypatch, track, *SETTINGS)
    code, _, err = track("--resume", *SETTINGS, "--memory", "every:2")
    assert code == 2 and err.count("\n") == 1 and "memory" in err
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "out", kept)
    (kept / "backward" / "00005.npz").unlink()
    code, _, err = track("--resume", *SETTINGS, out=kept)
    assert code == 2 and err.count("\n") == 1 and "00005.npz" in err


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 and nothing more", None])
def test_a_damaged_soft_mask_is_named(track, tmp_path, monkeypatch, damage):
    stopped_at(5, monkeypatch, track, *SETTINGS)
    file = tmp_path / "out" / "backward" / "00004.npz"
    whole = file.read_bytes()
    flipped = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 255]) + whole[len(whole) // 2 + 1 :]
    file.write_bytes(flipped if damage is None else damage)
    code, _, err = track("--resume", *SETTINGS)
    assert code == 2 and err.count("\n") == 1 and "00004.npz: is damaged, --overwrite tracks anew" in err


def test_live_input_and_a_first_mask_alone(track, clip, tmp_path):
    code, _, err = track("--both-ways", video="/dev/video0")
    assert code == 2 and "--both-ways: expected a video that can be read backwards, got live input" in err
    code, _, err = track(*SETTINGS, "--mask", clip / "masks" / "00000.png")
    assert code == 0 and "--both-ways: no later frame has a mask" in err
