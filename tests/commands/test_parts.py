"""`stm track` on a part of a video, and masks by their frames' own names."""

import json

import av
import numpy as np
import pytest
import torch
from answers import refused
from PIL import Image

from stm_model import STM, Tracker
from stm_model.commands.main import main
from stm_model.io.masks import read_mask, write_mask
from stm_model.io.video import open_video

CROP = (slice(4, 44), slice(10, 74))
GAPS = [1, 3, 4, 10, 11, 12, 40, 41]


@pytest.fixture
def given(clip, tmp_path):
    """The true mask of frame 2, alone in a file without a number."""
    path = tmp_path / "first.png"
    path.write_bytes((clip / "true" / "00002.png").read_bytes())
    return path


@pytest.fixture
def numbered(clip, tmp_path):
    """The clip's frames as a folder with gaps."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in zip(GAPS, open_video(clip / "clip.mp4"), strict=True):
        Image.fromarray(frame).save(folder / f"img_{number}.png")
    return folder


def expected(weights, frames, labels):
    """The labels that the tracker finds."""
    tracker = Tracker(STM.load(weights, device="cpu", dtype=torch.float32))
    return [result.labels for result in tracker.track(list(frames), labels)]


def found(out):
    """The written masks by name."""
    return {file.name: read_mask(file) for file in sorted((out / "masks").iterdir())}


def times(path):
    """When each frame of a video is shown, in seconds."""
    with av.open(str(path)) as file:
        return sorted(float(packet.pts * packet.time_base) for packet in file.demux(video=0) if packet.size)


def test_a_file_of_labelme_is_of_the_first_frame_that_is_tracked(track, clip, tmp_path):
    assert main(["convert", str(clip / "true"), "--to", "labelme", "--out", str(tmp_path / "to")]) == 0
    drawn = tmp_path / "first.json"
    drawn.write_bytes((tmp_path / "to" / "labelme" / "00002.json").read_bytes())
    assert track("--start", "2", mask=drawn)[0] == 0
    masks = found(tmp_path / "out")
    assert min(masks) == "00002.png" and len(masks) == 6
    true = read_mask(clip / "true" / "00002.png")
    # polygons lose some of the rims
    assert (masks["00002.png"] == true).mean() > 0.98 and set(np.unique(masks["00002.png"])) == set(np.unique(true))
    # a name that is the number of another frame
    third = drawn.rename(tmp_path / "00003.json")
    assert refused(track("--start", "2", "--overwrite", mask=third), "is the mask of another frame, by its name")


@pytest.mark.parametrize("start, end", [("2", "7"), ("0.08s", "0.29s"), ("0:00.08", "0:00:00.25001")])
def test_every_second_frame_from_one_to_another(track, clip, weights, given, tmp_path, start, end):
    part = ("--start", start, "--end", end, "--stride", "2", "--dtype", "float32")
    code, out, err = track(*part, "--json", "--export", "coco", "matte", mask=given)
    assert (code, err) == (0, "")
    masks = found(tmp_path / "out")
    assert list(masks) == ["00002.png", "00004.png", "00006.png"]
    frames = list(open_video(clip / "clip.mp4"))
    np.testing.assert_array_equal([*masks.values()], expected(weights, frames[2:7:2], {0: read_mask(given)}))
    summary = json.loads(out)
    assert (summary["frames"], summary["signals"]["7"]["from"]) == (3, 2)
    for name in ("overlay.mp4", "matte.mp4"):
        assert times(tmp_path / "out" / name) == pytest.approx([0, 2 / 24, 4 / 24], abs=1e-3)
    images = json.loads((tmp_path / "out" / "coco.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["00002.jpg", "00004.jpg", "00006.jpg"]


def test_a_crop_is_all_that_the_tracker_sees(track, clip, weights, tmp_path):
    code, out, err = track("--crop", "10,4,64,40", "--json", "--dtype", "float32")
    assert (code, err) == (0, "") and json.loads(out)["size"] == [48, 80]
    frames = list(open_video(clip / "clip.mp4"))
    inside = expected(weights, [frame[CROP] for frame in frames], {0: read_mask(clip / "mask.png")[CROP]})
    for labels, seen in zip(found(tmp_path / "out").values(), inside, strict=True):
        np.testing.assert_array_equal(labels[CROP], seen)
        assert labels.shape == (48, 80) and labels.sum() == seen.sum()
    assert open_video(tmp_path / "out" / "overlay.mp4").size == (48, 80)
    assert json.loads(out)["signals"]["7"]["area"][0] == round(float((labels_of(tmp_path, 0) == 7).mean()), 6)
    # the same again is finished, another crop is another run
    assert track("--crop", "10,4,64,40", "--dtype", "float32", "--resume")[0] == 0
    other = track("--crop", "10,4,64,41", "--dtype", "float32", "--resume")
    assert refused(other, "was tracked with --crop 10,4,64,40, now it is 10,4,64,41")


def labels_of(tmp_path, index):
    return read_mask(tmp_path / "out" / "masks" / f"{index:05d}.png")


def test_masks_are_of_the_videos_frames(track, clip, tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    for index in (1, 2, 5, 6):
        labels = read_mask(clip / "true" / f"{index:05d}.png")
        write_mask(folder / f"{index:05d}.png", np.where(labels == (7 if index < 5 else 9), labels, 0))
    code, _, err = track("--start", "2", "--stride", "2", mask=folder)
    assert code == 0 and err == "stm: warning: masks of frames that are not tracked are not used: 1, 5\n"
    seen = {name: set(np.unique(labels)) for name, labels in found(tmp_path / "out").items()}
    assert list(seen) == ["00002.png", "00004.png", "00006.png"]
    assert 9 not in seen["00004.png"] and {7, 9} <= seen["00006.png"] | {7}
    np.testing.assert_array_equal(labels_of(tmp_path, 6) == 9, read_mask(clip / "true" / "00006.png") == 9)


def test_both_ways_through_a_part(track, clip, weights, tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "00005.png").write_bytes((clip / "true" / "00005.png").read_bytes())
    part = ("--start", "1", "--end", "6", "--stride", "2", "--crop", "10,4,64,40")
    code, _, err = track(*part, "--both-ways", "--dtype", "float32", mask=folder)
    assert (code, err) == (0, "")
    tracker = Tracker(STM.load(weights, device="cpu", dtype=torch.float32))
    frames = [frame[CROP] for frame in list(open_video(clip / "clip.mp4"))[1:6:2]]
    results = tracker.track_both_ways(frames, {2: read_mask(folder / "00005.png")[CROP]})
    for result, labels in zip(results, found(tmp_path / "out").values(), strict=True):
        np.testing.assert_array_equal(labels[CROP], result.labels)


@pytest.mark.parametrize("start", ["4", "3"])
def test_frames_of_a_folder_give_their_masks_their_names(track, clip, numbered, tmp_path, start):
    code, out, err = track("--json", video=numbered)
    assert (code, err) == (0, "")
    whole = found(tmp_path / "out")
    assert set(whole) == {f"img_{number}.png" for number in GAPS} and json.loads(out)["frames"] == len(GAPS)
    # numbers are those of the names; what an earlier run wrote goes, and nothing else
    (tmp_path / "out" / "masks" / "mine.png").write_bytes(b"")
    folder = tmp_path / "given"
    folder.mkdir()
    number = 3 if start == "3" else 4
    (folder / f"{number}.png").write_bytes((clip / "true" / f"{GAPS.index(number):05d}.png").read_bytes())
    assert track("--start", start, "--end", "12", "--overwrite", video=numbered, mask=folder)[0] == 0
    left = {file.name for file in (tmp_path / "out" / "masks").iterdir()}
    assert left == {"mine.png", *(f"img_{each}.png" for each in GAPS if number <= each < 12)}
    assert track("--overwrite")[0] == 0
    left = {file.name for file in (tmp_path / "out" / "masks").iterdir()}
    assert left == {"mine.png", *(f"{index:05d}.png" for index in range(8))}


def test_other_commands_find_masks_by_the_names_of_frames(track, numbered, tmp_path, capsys):
    assert track(video=numbered)[0] == 0
    masks, out = tmp_path / "out" / "masks", tmp_path / "converted"
    assert main(["convert", str(masks), "--to", "png", "coco", "--video", str(numbered), "--out", str(out)]) == 0
    capsys.readouterr()
    for name, labels in found(tmp_path / "out").items():
        np.testing.assert_array_equal(labels, read_mask(out / "masks" / name))
    assert track("--overwrite", video=numbered, mask=out / "masks", out=tmp_path / "again")[0] == 0


def test_a_list_refuses_a_part_that_makes_no_sense_at_once(clip, weights, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"{clip}/clip.mp4 {clip}/mask.png\n")
    arguments = ["track", str(tmp_path / "list.txt"), "--out", str(tmp_path / "out"), "--checkpoint", str(weights)]
    assert refused((main([*arguments, "--stride", "0"]), *capsys.readouterr()), "--stride: expected at least 1, got 0")
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--end", "3", "--device", "cpu"]) == 0
    assert list(found(tmp_path / "out" / "clip")) == ["00000.png", "00001.png", "00002.png"]


def test_the_help_fits_two_screens(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["track", "--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) <= 2 * 50
