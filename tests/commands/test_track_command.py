"""`stm track` as its user meets it: files, exit codes, one line for each mistake."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from answers import refused

from stm_model import STM, Tracker
from stm_model.commands.main import main
from stm_model.evaluation.metrics import region_similarity, sequence_scores
from stm_model.io.masks import read_mask, resize_mask, write_mask
from stm_model.io.video import VideoFile, open_video

FRAMES = 8
CLIPS = Path(__file__).parents[3] / "shared" / "data" / "clips"
CLIP = CLIPS / "bear_480p"
JUDO = CLIPS / "cutie_judo"


def test_track_writes_masks_overlay_and_summary(track, clip, tmp_path):
    code, out, err = track()
    assert (code, err) == (0, "")
    files = sorted((tmp_path / "out" / "masks").iterdir())
    assert [file.name for file in files] == [f"{index:05d}.png" for index in range(FRAMES)]
    np.testing.assert_array_equal(read_mask(files[0]), read_mask(clip / "mask.png"))
    assert all(set(np.unique(read_mask(file))) <= {0, 7, 9} for file in files)
    overlay = open_video(tmp_path / "out" / "overlay.mp4")
    assert (overlay.frame_count, overlay.size, overlay.fps) == (FRAMES, (48, 80), 24)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["frames"], summary["objects"], summary["size"], summary["stopped"]) == (
        FRAMES,
        [7, 9],
        [48, 80],
        None,
    )
    assert summary["memory"]["rule"] == "every:5" and summary["peak_memory_bytes"]["process"] > 2**20
    assert 0 < summary["seconds"]["tracking"] + summary["seconds"]["waiting"] <= summary["seconds"]["wall"]
    assert summary["seconds"]["writing"] > 0
    assert summary["fps"] == pytest.approx(FRAMES / summary["seconds"]["tracking"])
    for word in ("8 of 80x48 pixels", "2 (labels 7, 9)", "frames a second", "peak memory", "overlay.mp4"):
        assert word in out


def test_json_stands_alone_on_stdout(track, tmp_path):
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    code, out, err = track("--json", "--no-overlay", "--size", "32", "--memory", "uniform:2", "--dtype", "float32")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert json.loads(out)["dtype"] == "float32"
    assert not (tmp_path / "out" / "overlay.mp4").exists() and "overlay" not in json.loads(out)["files"]


def test_the_speed_leaves_decoding_out(track, monkeypatch):
    decode = VideoFile._decoded

    def slowly(self):
        for frame in decode(self):
            time.sleep(0.2)
            yield frame

    monkeypatch.setattr(VideoFile, "_decoded", slowly)
    code, out, _ = track("--json")
    seconds = json.loads(out)["seconds"]
    assert code == 0 and seconds["decoding"] > 0.2 * FRAMES and seconds["tracking"] > 0
    # waiting counted twice would not fit into the whole
    assert seconds["tracking"] + seconds["waiting"] < seconds["wall"]


def test_the_masks_are_the_trackers(track, clip, weights, tmp_path):
    assert track("--dtype", "float32")[0] == 0
    frames = list(open_video(clip / "clip.mp4"))
    tracker = Tracker(STM.load(weights, device="cpu", dtype=torch.float32))
    for result in tracker.track(frames, {0: read_mask(clip / "mask.png")}):
        written = read_mask(tmp_path / "out" / "masks" / f"{result.index:05d}.png")
        np.testing.assert_array_equal(written, result.labels)


def test_objects_enter_by_a_folder_of_masks(track, clip, tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    truth = read_mask(clip / "true" / "00003.png")
    write_mask(folder / "first_0.png", np.where(read_mask(clip / "mask.png") == 7, 7, 0))
    write_mask(folder / "later_3.png", np.where(truth == 9, 9, 0))
    code, out, _ = track("--json", mask=folder)
    assert code == 0 and json.loads(out)["objects"] == [7, 9]
    labels = [set(np.unique(read_mask(tmp_path / "out" / "masks" / f"{t:05d}.png"))) for t in range(4)]
    assert all(9 not in seen for seen in labels[:3]) and 9 in labels[3]


def test_a_mask_for_every_frame_is_pointed_out(track, clip):
    code, _, err = track(mask=clip / "true")
    assert code == 0 and err == "stm: warning: every frame has a given mask: nothing is left to track\n"


def test_a_black_and_white_mask_needs_binary(track, clip, tmp_path):
    write_mask(tmp_path / "mask.png", np.where(read_mask(clip / "mask.png") == 7, 255, 0))
    assert refused(track(mask=tmp_path / "mask.png"), "its only label is 255", "--binary")
    code, out, _ = track("--json", "--binary", mask=tmp_path / "mask.png")
    assert code == 0 and json.loads(out)["objects"] == [1]


def test_a_mask_of_another_size_is_resized_only_when_asked(track, clip, tmp_path):
    write_mask(tmp_path / "mask.png", resize_mask(read_mask(clip / "mask.png"), (96, 160)))
    assert refused(track(mask=tmp_path / "mask.png"), "160x96", "80x48", "--resize-mask")
    assert not (tmp_path / "out").exists()
    code, _, _ = track("--resize-mask", mask=tmp_path / "mask.png")
    assert code == 0 and read_mask(tmp_path / "out" / "masks" / "00000.png").shape == (48, 80)


def test_one_mask_of_another_size_among_many(track, clip, tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    labels = read_mask(clip / "mask.png")
    write_mask(folder / "00000.png", np.where(labels == 7, 7, 0))
    write_mask(folder / "00003.png", np.where(labels == 9, 9, 0)[:, 1:])
    assert refused(track(mask=folder), "the mask of frame 3 is 79x48", "80x48", "--resize-mask")
    code, out, _ = track("--json", "--resize-mask", mask=folder)
    assert code == 0 and json.loads(out)["objects"] == [7, 9]


def test_a_full_folder_is_refused_and_only_results_are_overwritten(track, tmp_path):
    out = tmp_path / "out"
    (out / "masks").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    write_mask(out / "masks" / "00099.png", np.zeros((4, 4), dtype=np.uint8))
    (out / "masks" / ".00100.partial.png").write_text("left by a run that was killed")
    assert refused(track(), "is not empty", "--overwrite")
    assert (out / "masks" / "00099.png").exists()
    assert track("--overwrite")[0] == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert len(list((out / "masks").iterdir())) == FRAMES


def test_results_never_overwrite_the_input(track, clip, tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "00000.png").write_bytes((clip / "mask.png").read_bytes())
    for mask in (tmp_path / "masks", tmp_path / "masks" / "00000.png"):
        assert refused(track("--overwrite", mask=mask, out=tmp_path), "would overwrite the mask")
    assert (tmp_path / "masks" / "00000.png").exists()


def test_what_a_run_will_remember_is_said_before_and_after(track, tmp_path):
    # 3 × 5 positions, 2 objects, 16 + 16 channels of 4 bytes
    kib = 15 * 2 * 32 * 4 / 1024
    planned = f"7 frames of 80x48 pixels and 2 objects: {7 * kib:.1f} KiB, {kib:.1f} KiB a frame"
    code, out, _ = track("--memory", "every:1", "--dtype", "float32")
    assert code == 0 and out.startswith(f"remembers   {planned}\n")
    memory = json.loads((tmp_path / "out" / "summary.json").read_text())["memory"]
    assert memory["planned"] == planned and memory["positions_dropped"] == 0
    assert memory["most_bytes"]["device"] >= 7 * kib * 1024 and memory["most_bytes"]["host"] == 0


def test_a_video_of_unknown_length_is_tracked_without_a_plan(track, monkeypatch):
    monkeypatch.setattr(VideoFile, "frame_count", property(lambda self: None, lambda self, count: None), False)
    code, out, err = track("--json")
    assert (code, err) == (0, "") and json.loads(out)["memory"]["planned"] is None
    assert json.loads(out)["frames"] == FRAMES


def test_the_summary_says_where_an_object_is_likely_lost(track, clip, tmp_path, monkeypatch):
    import stm_model.tracking.session

    certainties = iter([[1.0, 1.0], [0.9, 0.6]] + [[0.85, 0.7]] * (FRAMES - 3) + [[0.0, 0.9]])
    monkeypatch.setattr(stm_model.tracking.session, "certainty_of", lambda *_: next(certainties))
    monkeypatch.setattr(stm_model.tracking.session, "agreement_of", lambda *_: [1.0, 1.0])
    monkeypatch.setattr(stm_model.tracking.folder, "UNTRUSTED", 0.7)
    code, out, _ = track("--skip-uncertain")
    assert code == 0 and f"object 7 in 1 frames from {FRAMES - 1} on" in out and "object 9 in 1 frames from 1 on" in out
    signals = json.loads((tmp_path / "out" / "summary.json").read_text())["signals"]
    assert signals["7"]["uncertain"] == [FRAMES - 1] and signals["9"]["uncertain"] == [1]
    for label, noted in signals.items():
        masks = [read_mask(tmp_path / "out" / "masks" / f"{index:05d}.png") for index in range(FRAMES)]
        assert noted["area"] == [round(float((mask == int(label)).mean()), 6) for mask in masks]
        assert noted["from"] == 0 and len(noted["certainty"]) == FRAMES and noted["trust"] == noted["certainty"]
        assert noted["familiarity"][0] is None and all(value is not None for value in noted["familiarity"][1:])


@pytest.mark.parametrize("eviction", ["fifo", "use"])
def test_a_budget_is_kept(track, tmp_path, eviction):
    page = 128 * 2 * 32 * 4
    arguments = ("--memory", "every:1", "--dtype", "float32", "--eviction", eviction, "--json")
    code, out, err = track(*arguments, "--memory-budget", f"{page}")
    assert code == 0 and json.loads(out)["memory"]["most_bytes"] == {"device": page, "host": 0}
    code, out, err = track(*arguments, "--memory-budget", "0", "--host-budget", "1MiB", "--overwrite")
    assert code == 0 and json.loads(out)["memory"]["most_bytes"] == {"device": 0, "host": page}


def test_a_budget_that_cannot_work_is_refused_before_the_run(track, tmp_path):
    # a page of 128 positions, 2 objects, 16 + 16 channels of 4 bytes
    least = f"{128 * 2 * 32 * 4 / 1024:.1f} KiB for 2 objects and the frames that must stay"
    for budget, said in {"1000": "1000 bytes", str(2 * 15 * 2 * 32 * 4): "7.5 KiB"}.items():
        result = track("--memory-budget", budget, "--dtype", "float32")
        assert refused(result, f"memory budget: expected at least {least}, got {said}")
    assert refused(track("--memory-budget", "lots"), "--memory-budget: expected a size like 2GiB", "'lots'")
    assert refused(track("--host-budget", "-5"), "--host-budget: expected a size like 2GiB", "'-5'")
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(track, clip, weights, tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    write_mask(tmp_path / "blank.png", np.zeros((48, 80), dtype=np.uint8))
    torch.save({"module.fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    assert refused(track(video=tmp_path / "gone.mp4"), "gone.mp4: no such video")
    assert refused(track(video=tmp_path / "file"), "file: does not open as a video")
    assert refused(track(video=tmp_path / "empty"), "empty: no frames")
    assert refused(track(mask=tmp_path / "gone.png"), "gone.png: no such file")
    assert refused(track(mask=tmp_path / "blank.png"), "blank.png: an empty mask")
    assert refused(track(out=tmp_path / "file"), "is a file; expected a folder")
    assert refused(track(checkpoint=tmp_path / "gone.pth"), "gone.pth")
    assert refused(
        track(checkpoint=tmp_path / "other.pth"), "other.pth does not hold an STM", "missing Encoder_M.conv1.weight"
    )
    assert refused(track("--memory", "sometimes"), "memory", "sometimes")
    assert refused(track("--top-k", "0"), "top_k", "at least 1")
    assert refused(track("--skip", "1"), "skip", "in [0, 1)")
    assert refused(track("--size", "4"), "size", "4")
    assert refused(track("--device", "cuda:99"), "device: cuda:99 cannot be used here")
    assert refused(track("--device", "toaster"), "device: toaster cannot be used here")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not CLIP.is_dir(), reason="the bear clip is not here")
def test_a_real_video_end_to_end(tmp_path):
    """The default weights on a real H.264 video, through the command, scored against its ground truth."""
    truths = [read_mask(file) for file in sorted((CLIP / "Annotations").iterdir())]
    arguments = [CLIP / "bear.mp4", "--mask", CLIP / "Annotations" / "00000.png", "--out", tmp_path]
    assert main(["track", *map(str, arguments), "--no-overlay"]) == 0
    predictions = [read_mask(file) for file in sorted((tmp_path / "masks").iterdir())]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["settings"]["size"] is None and summary["network_size"] == summary["size"]
    region, _ = sequence_scores(predictions, truths)[1]
    assert region >= 0.5


@pytest.mark.skipif(not JUDO.is_dir(), reason="the judo clip is not here")
def test_four_objects_that_enter_one_by_one_forwards_and_back(tmp_path):
    """There and back again, each object is where its given mask had it; the masks it came back from are not."""
    given = {int(file.stem): file for file in sorted((JUDO / "Annotations").iterdir())}
    there = tmp_path / "there"
    arguments = ["--mask", JUDO / "Annotations", "--out", there, "--resize-mask", "--no-overlay"]
    assert main(["track", str(JUDO / "JPEGImages"), *map(str, arguments)]) == 0
    frames = sorted((JUDO / "JPEGImages").iterdir())
    turned = tmp_path / "turned"
    turned.mkdir()
    for index, frame in enumerate(reversed(frames)):
        (turned / f"{index:05d}.jpg").write_bytes(frame.read_bytes())
    start = there / "masks" / f"{frames[-1].stem}.png"
    arguments = ["--mask", start, "--out", tmp_path / "back", "--no-overlay"]
    assert main(["track", str(turned), *map(str, arguments)]) == 0
    repeated, scores, repeated_scores = read_mask(start), [], []
    for label, (index, file) in enumerate(given.items(), start=1):
        truth = read_mask(file) == label
        found = read_mask(tmp_path / "back" / "masks" / f"{len(frames) - 1 - index:05d}.png")
        truth = resize_mask(truth.astype(np.uint8), found.shape) > 0
        scores.append(region_similarity(found == label, truth))
        repeated_scores.append(region_similarity(repeated == label, truth))
    print(scores, repeated_scores)
    assert min(scores) > 0.5
    assert np.mean(scores) > np.mean(repeated_scores)
