"""Live input: FFmpeg feeds a pipe, a stream is cut off, a camera is not there."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from answers import STM, refused
from table import Fault, each, judge

from stm_model.commands.track import TrackConfig, make_tracker
from stm_model.io import live
from stm_model.io.live import LiveVideo
from stm_model.io.masks import read_mask
from stm_model.io.video import BrokenVideo

Y4M_FRAME = 48 * 80 * 3 // 2


@pytest.fixture(scope="module")
def ffmpeg():
    return pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()


@pytest.fixture
def fed(monkeypatch):
    """Put bytes, or what a process says, on stdin; `end` False leaves it open after the bytes."""
    opened = []

    def feed(source, end=True):
        if isinstance(source, bytes):
            reading, writing = os.pipe()
            opened.append(os.fdopen(writing, "wb", buffering=0))

            def write():
                opened[-1].write(source)
                if end:
                    opened[-1].close()

            threading.Thread(target=write, daemon=True).start()
            source = os.fdopen(reading, "rb")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(source))

    yield feed
    for file in opened:
        file.close()


def encoded(frames, form):
    """Frames as a y4m or mjpeg stream, by PyAV."""
    file = io.BytesIO()
    with av.open(file, "w", format={"y4m": "yuv4mpegpipe"}.get(form, form)) as container:
        stream = container.add_stream({"y4m": "wrapped_avframe"}.get(form, form), rate=30)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p" if form == "y4m" else "yuvj420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.fixture(scope="module")
def frames():
    return [np.full((48, 80, 3), 20 * index, np.uint8) for index in range(10)]


def masks_of(out):
    return [read_mask(file) for file in sorted((out / "masks").iterdir())]


@pytest.mark.parametrize("form", ["yuv4mpegpipe", "mjpeg", "matroska"])
def test_ffmpeg_feeds_a_pipe_faster_than_it_is_tracked_and_nothing_is_lost(ffmpeg, clip, track, fed, out, form):
    command = [ffmpeg, "-v", "error", "-stream_loop", "3", "-i", clip / "clip.mp4", "-f", form, "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        fed(process.stdout)
        code, said, err = track(video="-")
    assert (code, err) == (0, "") and "every frame kept, 0 dropped" in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["frames"] == len(masks_of(out)) == 40
    assert summary["live"]["dropped"] == summary["live"]["damaged"] == 0
    assert track(out=out.with_name("file"))[0] == 0
    if form == "yuv4mpegpipe":
        # the same pixels
        for piped, read in zip(masks_of(out), masks_of(out.with_name("file"))):
            np.testing.assert_array_equal(piped, read)


def test_the_newest_frame_is_kept_and_the_first(frames, fed):
    fed(encoded(frames, "y4m"))
    with LiveVideo("-", every=False) as video:
        given_up = time.monotonic() + 60
        while video.dropped < 8 and time.monotonic() < given_up:
            time.sleep(0.01)
        kept = [round(float(frame.mean()), -1) for frame in video]
    assert kept == [0, 180] and list(video.arrived) == [0, 9] and video.dropped == 8
    assert video.summary()["dropped"] == 8 and len(video.latencies) == 1 and float(video.fps) == 30


def test_masks_have_the_numbers_of_their_frames_and_the_summary_does_not_grow(
    frames, clip, track, fed, out, monkeypatch
):
    monkeypatch.setattr("stm_model.tracking.folder.MOST_UNCERTAIN", 1)
    monkeypatch.setattr("stm_model.tracking.folder.UNTRUSTED", 1.1)
    monkeypatch.setattr("stm_model.io.live.LiveVideo._put", dropping(LiveVideo._put, {2, 3, 6}))
    fed(encoded(frames, "y4m"))
    assert track("--live", "every", video="-")[0] == 0
    assert [file.stem for file in sorted((out / "masks").iterdir())] == [
        f"{index:05d}" for index in (0, 1, 4, 5, 7, 8, 9)
    ]
    lines = [json.loads(line) for line in (out / "signals.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == [0, 1, 4, 5, 7, 8, 9]
    summary = json.loads((out / "summary.json").read_text())
    for label, noted in summary["signals"].items():
        assert noted == {"from": 0, "uncertain": [0], "lost": 7}
        assert {"area", "certainty", "familiarity", "trust"} == set(lines[3]["objects"][label])
    assert summary["files"]["signals"] == str(out / "signals.jsonl")
    # another run replaces it
    fed(encoded(frames, "y4m"))
    assert track("--live", "every", "--overwrite", video="-")[0] == 0
    assert len((out / "signals.jsonl").read_text().splitlines()) == 7


def dropping(put, numbers):
    """A source of which some frames are never seen."""
    return lambda self, arrived: None if arrived.number in numbers else put(self, arrived)


def test_positions_of_ten_frames_are_remembered_besides_those_of_the_given_mask(clip, track, fed, out):
    # 128 positions, a page
    frames = [np.full((128, 256, 3), 10 * index, np.uint8) for index in range(20)]
    memory = ["--memory", "first+every:1", "--size", "128"]
    for index, (budget, kept) in enumerate(((["--memory-budget", "64MiB"], 19), ([], 11))):
        fed(encoded(frames, "y4m"))
        folder = out.with_name(f"out{index}")
        assert track(*memory, "--resize-mask", *budget, video="-", out=folder)[0] == 0
        assert json.loads((folder / "summary.json").read_text())["memory"]["positions_kept"] == kept * 128


def test_what_waits_is_bounded(frames, fed):
    """The source waits, not the memory."""
    fed(encoded(frames * 20, "mjpeg"))
    with LiveVideo("-", every=True) as video:
        time.sleep(0.2)
        assert video._queue.qsize() <= video._queue.maxsize == 3
        assert len(list(video)) == 200 and video.dropped == 0


@pytest.mark.parametrize("form", ["y4m", "png"])
def test_masks_are_a_stream_on_stdout(form, clip, track, fed, frames, out, tmp_path, monkeypatch):
    assert track(video=clip / "frames")[0] == 0
    with open(tmp_path / "stdout", "wb") as file:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file))
        code, _, err = track("--stream", form, video=clip / "frames", out=tmp_path / "streamed")
    assert code == 0 and "frames      10 of" in err and not list((tmp_path / "streamed" / "masks").iterdir())
    kind = {"y4m": "yuv4mpegpipe", "png": "png_pipe"}[form]
    with av.open(str(tmp_path / "stdout"), format=kind) as container:
        found = [frame.to_ndarray() for frame in container.decode(video=0)]
    assert len(found) == 10
    for seen, mask in zip(found, masks_of(out)):
        # of a picture with a palette PyAV gives the indices and the palette
        np.testing.assert_array_equal(seen if form == "y4m" else seen[0], mask)


def test_a_part_of_each_frame_is_tracked(frames, clip, track, fed, out):
    fed(encoded(frames, "y4m"))
    assert track("--crop", "8,0,64,48", video="-")[0] == 0
    masks = [read_mask(file) for file in sorted((out / "masks").iterdir())]
    assert len(masks) == len(frames) and all(mask.shape == (48, 80) for mask in masks)
    assert not any(mask[:, :8].any() or mask[:, 72:].any() for mask in masks) and masks[1].any()


def test_a_stream_that_is_lost_is_connected_again(frames, track, out, monkeypatch):
    monkeypatch.setattr(live, "PAUSE", 0.01)
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        for _ in range(2):
            with server.accept()[0] as connection:
                connection.sendall(encoded(frames[:5], "y4m"))
        server.close()

    threading.Thread(target=serve, daemon=True).start()
    code, said, err = track("--live", "every", video=f"tcp://127.0.0.1:{server.getsockname()[1]}")
    *warnings, last = err.splitlines()
    assert code == 2 and "broke off after 10 frames (Connection refused); the masks of 10 frames are kept" in last
    assert "connected again 6 times" in said and len(masks_of(out)) == 10
    assert ["ended; connecting again (1 of 5)" in line for line in warnings[:2]] == [True, True]
    assert "Connection refused; connecting again (5 of 5)" in warnings[-1]


def test_a_signal_ends_it_with_all_that_was_tracked(ffmpeg, clip, weights, out):
    feed = [ffmpeg, "-v", "quiet", "-re", "-stream_loop", "-1", "-i", clip / "clip.mp4", "-f", "yuv4mpegpipe", "-"]
    options = ["--mask", clip / "mask.png", "--out", out, "--checkpoint", weights, "--device", "cpu", "--json"]
    with subprocess.Popen(feed, stdout=subprocess.PIPE) as source:
        command = [*STM, "track", "-", *options]
        with subprocess.Popen(
            command, stdin=source.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as tracking:
            given_up = time.monotonic() + 120
            begun = out / "masks" / "00005.png"
            while not begun.exists() and tracking.poll() is None and time.monotonic() < given_up:
                time.sleep(0.05)
            tracking.send_signal(signal.SIGTERM)
            try:
                said, err = tracking.communicate(timeout=60)
            finally:
                tracking.kill()
                source.kill()
    summary = json.loads(said)
    assert tracking.returncode == 143 and err.count("\n") == 1 and "interrupted; the masks of" in err
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["frames"] == len(masks_of(out)) >= 6
    with av.open(str(out / "overlay.mp4")) as container:
        assert len(list(container.decode(video=0))) == summary["frames"]


STREAMS = [
    Fault(
        "a y4m stream that ends within a frame",
        lambda frames, _: {"bytes": encoded(frames, "y4m")[: -Y4M_FRAME // 2]},
        "stdin: broke off after 9 frames (ends within a frame); the masks of 9 frames are kept in",
        masks=9,
    ),
    Fault(
        "an mjpeg stream that ends within a frame",
        lambda frames, _: {"bytes": encoded(frames, "mjpeg")[:-20]},
        "stdin: broke off after 9 frames (ends within a frame); the masks of 9 frames are kept in",
        masks=9,
    ),
    Fault(
        "a stream that changes its size",
        lambda frames, _: {
            "bytes": encoded(frames, "mjpeg") + encoded([frame[::2, ::2].copy() for frame in frames], "mjpeg")
        },
        "stdin: its frames change from 80x48 to 40x24 pixels; the masks of 10 frames are kept in",
        masks=10,
    ),
    Fault(
        "a stream that stalls",
        lambda frames, _: {"bytes": encoded(frames, "y4m"), "end": False},
        "stdin: no frame for 2 s; the masks of 10 frames are kept in",
        masks=10,
    ),
    Fault("nothing on stdin", lambda *_: {"bytes": b""}, "stdin: brings no video (Invalid data found"),
    Fault("something else on stdin", lambda *_: {"bytes": b"a,b\n" * 999}, "stdin: brings no video (Invalid data"),
    Fault(
        "a y4m stream without a frame",
        lambda frames, _: {"bytes": encoded(frames, "y4m").partition(b"FRAME")[0]},
        "stdin: brings no video (",
    ),
]


@each(STREAMS)
def test_the_line_and_what_is_kept(fault, track, frames, fed, clip, tmp_path, out, monkeypatch):
    monkeypatch.setattr(live, "STALL", 2.0)

    def arrange(_, made):
        changed = fault.arrange(frames, made)
        fed(changed.pop("bytes"), **changed)
        return {"video": "-"}

    judge(fault._replace(arrange=arrange), track, clip, tmp_path / "made", out)


REFUSED = [
    Fault("no such camera", lambda *_: {"video": "/dev/video77"}, "/dev/video77: brings no video (No such file"),
    Fault(
        "nobody at an address",
        lambda *_: {"video": "rtsp://127.0.0.1:9//stream"},
        "rtsp://127.0.0.1:9//stream: brings no video (Connection refused)",
    ),
    Fault("live input resumed", lambda *_: {"video": "-", "extra": ["--resume"]}, "--resume: expected a video file"),
    Fault("a file as live input", lambda *_: {"extra": ["--live", "every"]}, "--live every: expected live input, got"),
    Fault(
        "two things on stdout",
        lambda *_: {"extra": ["--stream", "y4m", "--json"]},
        "--json and --stream both write to stdout",
    ),
]


@each(REFUSED)
def test_what_is_refused(fault, track, clip, tmp_path, out):
    judge(fault, track, clip, tmp_path / "made", out)


def test_live_input_needs_a_mask(out, capsys):
    from stm_model.commands.main import main

    assert refused((main(["track", "-", "--out", str(out)]), *capsys.readouterr()), "-: live input needs the --mask")


def test_a_broken_stream_raises_after_its_frames(frames, fed):
    fed(encoded(frames, "y4m")[:-7])
    seen = []
    with LiveVideo("-", every=True) as video, pytest.raises(BrokenVideo, match="ends within a frame") as caught:
        seen.extend(video)
    assert caught.value.frames_read == 9


def test_no_mask_waits_for_the_next_frame(small_model):
    for video, ahead in (("-", False), (Path("clip.mp4"), True)):
        config = TrackConfig(video=video, out=Path("out"), mask=Path("mask.png"))
        assert make_tracker(config, small_model).ahead == ahead
