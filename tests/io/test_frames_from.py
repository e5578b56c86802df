"""A video read from any of its frames, and backwards, is the video read from its start."""

import av
import numpy as np
import pytest
from PIL import Image

from stm_model.io.video import open_video
from stm_model.tracking import both_ways
from stm_model.tracking.both_ways import backwards

KINDS = {
    "far keyframes and B-frames": ("a.mp4", "libx264", {"g": "250", "bf": "3"}),
    "near keyframes": ("a.mkv", "libx264", {"g": "8", "bf": "2"}),
    "open groups": ("a.mp4", "libx264", {"g": "8", "bf": "2", "x264-params": "open-gop=1"}),
    "vp9": ("a.webm", "libvpx-vp9", {"g": "10", "deadline": "realtime"}),
    "a transport stream": ("a.ts", "libx264", {"g": "12", "bf": "2"}),
    "no time stamps": ("a.avi", "mpeg4", {"g": "12"}),
}


@pytest.fixture(params=KINDS, scope="module")
def video(request, tmp_path_factory):
    """A clip of 40 frames that differ."""
    name, codec, options = KINDS[request.param]
    path = tmp_path_factory.mktemp("video") / name
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = 48, 64, "yuv420p", 4_000_000
        for index in range(40):
            frame = random.integers(0, 40, (48, 64, 3), dtype=np.uint8) + np.uint8(5 * index)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return open_video(path)


def test_from_any_frame_on(video):
    whole = list(video)
    assert len(whole) == 40
    for start in (0, 1, 7, 8, 9, 23, 31, 39):
        part = list(video.frames_from(start))
        assert len(part) == 40 - start
        assert all(map(np.array_equal, part, whole[start:])), start


def test_frames_are_sought_where_the_file_says_when_they_are_shown(video):
    assert len(video._shown) == (0 if video.path.suffix in (".avi", ".ts") else 40)


def test_backwards(video, monkeypatch):
    monkeypatch.setattr(both_ways, "WINDOW", 7)
    whole = list(video)
    found = list(backwards(video, 33))
    assert len(found) == 34
    assert all(map(np.array_equal, found, whole[33::-1]))
    with pytest.raises(ValueError, match="masks: frame 45 has one, but the video ends after 40 frames"):
        list(backwards(video, 45))


def test_damaged_frames_keep_their_numbers(tmp_path):
    """One packet of a file of keyframes is left out: the frame before stands in for it, from wherever one starts."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"g": "1"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for index in range(20):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        packet = bytes([packet for packet in container.demux(video=0) if packet.size][11])
    content = path.read_bytes()
    assert content.count(packet) == 1
    path.write_bytes(content.replace(packet, bytes(len(packet))))
    video = open_video(path)
    whole = []
    with pytest.raises(ValueError, match="damaged"):
        whole.extend(frame for frame in video)
    whole = list(video.frames_from(0))
    assert len(whole) == 20
    assert np.array_equal(whole[10], whole[11])
    for start in (3, 11, 12, 15):
        assert all(map(np.array_equal, video.frames_from(start), whole[start:])), start


def test_a_folder(tmp_path):
    for index in range(5):
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(tmp_path / f"{index}.png")
    folder = open_video(tmp_path)
    assert [int(frame[0, 0, 0]) for frame in folder.frames_from(2)] == [2, 3, 4]
    assert [int(frame[0, 0, 0]) for frame in backwards(folder, 3)] == [3, 2, 1, 0]
