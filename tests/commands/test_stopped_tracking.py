"""Whatever stops `stm track`, what was tracked is kept, and one line says why it stopped."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from answers import STM

from stm_model import Tracker
from stm_model.data.synthetic import procedural_clip
from stm_model.io.masks import write_mask
from stm_model.io.video import VideoWriter, open_video
from stm_model.tracking import folder

FRAMES = 8


def test_a_broken_video_keeps_what_was_tracked(track, tmp_path):
    random = np.random.default_rng(0)
    path = tmp_path / "cut.mkv"
    with VideoWriter(tmp_path / "whole.mp4") as writer:
        for _ in range(24):
            writer.write(random.integers(0, 255, (48, 80, 3), dtype=np.uint8))
    with av.open(str(tmp_path / "whole.mp4")) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    code, out, err = track("--json", video=path)
    summary = json.loads(out)
    count = summary["frames"]
    assert code == 2 and 4 < count < 20
    assert (
        err.count("\n") == 1
        and f"breaks off after {count} frames" in err
        and f"masks of {count} frames are kept" in err
    )
    assert "breaks off" in summary["stopped"]
    assert len(list((tmp_path / "out" / "masks").iterdir())) == count
    assert open_video(tmp_path / "out" / "overlay.mp4").frame_count == count


def _stop_after(monkeypatch, error, count=3):
    original = Tracker.track

    def stopping(self, *arguments, **options):
        for result in original(self, *arguments, **options):
            if result.index == count:
                raise error
            yield result

    monkeypatch.setattr(Tracker, "track", stopping)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "CUDA out of memory"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_whatever_stops_a_run_keeps_what_was_tracked(track, tmp_path, monkeypatch, error, code, words):
    _stop_after(monkeypatch, error)
    result, _, err = track()
    assert result == code
    assert err.startswith(f"stm: error: {words}") and "masks of 3 frames are kept" in err and err.count("\n") == 1
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 3
    assert open_video(tmp_path / "out" / "overlay.mp4").frame_count == 3
    assert words in json.loads((tmp_path / "out" / "summary.json").read_text())["stopped"]


@pytest.mark.parametrize("written", [0, 3, FRAMES - 1])
def test_a_disk_that_is_full_ends_the_run(track, tmp_path, monkeypatch, written):
    """What fails in the writing thread ends the tracking, with the same line."""
    write, names = write_mask, []

    def until_full(path, labels):
        if len(names) == written:
            raise OSError(28, "No space left on device", str(path))
        names.append(path.name)
        write(path, labels)

    monkeypatch.setattr(folder, "write_mask", until_full)
    code, out, err = track()
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("stm: error: ") and f"{written:05d}.png: No space left on device" in err
    assert sorted(file.name for file in (tmp_path / "out" / "masks").iterdir()) == names
    assert len(names) == written and (tmp_path / "out" / "overlay.mp4").exists() == bool(written)
    assert not list((tmp_path / "out").glob(".*"))
    if written:
        assert f"masks of {written} frames are kept" in err
        assert open_video(tmp_path / "out" / "overlay.mp4").frame_count == written


def test_a_bug_of_ours_shows_its_traceback(track, tmp_path, monkeypatch):
    _stop_after(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        track()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["stopped"] == "unfinished"


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_keeps_what_was_tracked(weights, tmp_path, name, code):
    frames, labels = procedural_clip(frames=24, size=(240, 432), objects=1)
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        for frame in np.concatenate([frames, frames[::-1]] * 8):
            writer.write(frame)
    write_mask(tmp_path / "mask.png", labels[0])
    out = tmp_path / "out"
    command = [*STM, "track", "clip.mp4", "--mask", "mask.png", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [*command, "--checkpoint", str(weights), "--device", "cpu"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (out / "masks" / "00003.png").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    count = len(list((out / "masks").glob("?????.png")))
    assert "interrupted; the masks of" in err and "Traceback" not in err and 4 <= count < 384
    assert open_video(out / "overlay.mp4").frame_count == count
    assert json.loads((out / "summary.json").read_text())["stopped"] == "interrupted"
