"""Pictures and video: what goes in comes out, and what cannot be used is refused by name."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from stm_model.io import images
from stm_model.io.images import MediaError
from stm_model.io.masks import resize_mask
from stm_model.io.video import BrokenVideo, VideoWriter, open_video

SIZE = (48, 64)


def _frames(count, size=SIZE, noise=0):
    """A white square that moves to the right on grey; `noise` makes packets large enough to be cut through."""
    random = np.random.default_rng(0)
    frames = np.full((count, *size, 3), 90, dtype=np.uint8)
    for index, frame in enumerate(frames):
        if noise:
            frame += random.integers(0, noise, frame.shape, dtype=np.uint8)
        frame[8:24, 2 * index : 2 * index + 16] = 250
    return frames


def _write_video(path, frames, codec="libx264", rotation=0, gop_size=250, container_options=None):
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=24)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 8_000_000
        stream.gop_size = gop_size
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def _write_pictures(folder, frames, pattern="{}.png"):
    folder.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / pattern.format(index))
    return folder


def _mask(*labels, size=SIZE):
    mask = np.zeros(size, dtype=np.uint8)
    for index, label in enumerate(labels):
        mask[10 * index + 2 : 10 * index + 9, 5:30] = label
    return mask


# video in


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4")]
)
def test_a_video_file_yields_its_frames_in_order_every_time(tmp_path, name, codec):
    frames = _frames(12)
    video = open_video(_write_video(tmp_path / name, frames, codec))
    assert (video.size, video.frame_count, video.fps, video.name) == (SIZE, 12, 24, "a")
    for _ in range(2):
        read = list(video)
        assert len(read) == 12 and all(frame.dtype == np.uint8 and frame.shape == (*SIZE, 3) for frame in read)
        for frame, expected in zip(read, frames):
            assert np.abs(frame.astype(int) - expected).mean() < 6


def test_a_rotated_video_comes_out_upright(tmp_path):
    frames = np.zeros((3, *SIZE, 3), dtype=np.uint8)
    frames[:, :8] = 255
    video = open_video(_write_video(tmp_path / "a.mp4", frames, rotation=90))
    frame = next(iter(video))
    assert video.size == frame.shape[:2] == (64, 48)
    assert frame[:, :8].mean() > 240 and frame[:, 8:].mean() < 15  # counter-clockwise: the top is now left


def test_a_folder_of_frames_is_read_in_natural_order(tmp_path):
    frames = _frames(12)
    folder = _write_pictures(tmp_path / "clip", frames, "frame{}.png")
    (folder / "notes.txt").write_text("not a frame")
    (folder / ".hidden.png").write_text("not a frame")
    video = open_video(folder)
    assert (video.size, video.frame_count, video.fps, video.name) == (SIZE, 12, 24, "clip")
    np.testing.assert_array_equal(np.stack(list(video)), frames)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("a.mp4", "libx264", {"movflags": "faststart"}), ("a.mkv", "libx264", {}), ("a.avi", "mpeg4", {})],
)
def test_a_video_that_breaks_off_gives_its_good_frames_first(tmp_path, name, codec, options):
    path = _write_video(tmp_path / name, _frames(48, noise=120), codec, container_options=options)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 6 // 10])
    count = 0
    with pytest.raises(BrokenVideo, match=rf"{name}: the video breaks off after \d+") as caught:
        for _ in open_video(path):
            count += 1
    assert 20 <= count == caught.value.frames_read < 40


def _blank_packet(path, number):
    """Overwrite one picture's data in a video file with zeros."""
    with av.open(str(path)) as container:
        data = [bytes(packet) for packet in container.demux(video=0)][number]
    whole = path.read_bytes()
    assert whole.count(data) == 1
    path.write_bytes(whole.replace(data, bytes(len(data))))


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx"), ("a.mp4", "libx264")])
def test_in_place_of_a_frame_that_cannot_be_decoded_comes_the_one_before(tmp_path, name, codec):
    frames = _frames(24, noise=60)
    path = _write_video(tmp_path / name, frames, codec, gop_size=12)
    with av.open(str(path)) as container:  # packets are stored in the order of decoding
        packets = [packet for packet in container.demux(video=0) if packet.size]
    times = [packet.pts for packet in packets]
    # the next one needs none before it; where an encoder puts those is its own affair
    number = next(n for n in range(8, 24) if packets[n + 1].is_keyframe)
    if codec == "libx264":  # one that is shown before a picture already decoded
        number = next(n for n in range(8, 24) if times[n] < max(times[:n]))
    _blank_packet(path, number)
    read = []
    blank = sorted(times).index(times[number])
    with pytest.raises(BrokenVideo, match=rf"{name}: 1 of 24 frames are damaged \({blank}\)") as caught:
        for frame in open_video(path):
            read.append(frame)
    assert caught.value.frames_read == 24
    nearest = [np.abs(frame.astype(int) - frames).mean((1, 2, 3)).argmin() for frame in read]
    assert nearest == [*range(blank), blank - 1, *range(blank + 1, 24)]


def test_a_video_cut_out_of_a_longer_one_starts_with_the_first_frame_that_needs_none_before(tmp_path):
    frames = _frames(24, noise=60)
    whole = _write_video(tmp_path / "whole.avi", frames, "libvpx-vp9", gop_size=12)
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.avi"), "w") as cut:
        stream = cut.add_stream_from_template(source.streams.video[0])
        for packet in [packet for packet in source.demux(video=0) if packet.size][3:]:
            packet.stream = stream
            cut.mux(packet)
    read = list(open_video(tmp_path / "cut.avi"))
    nearest = [np.abs(frame.astype(int) - frames).mean((1, 2, 3)).argmin() for frame in read]
    assert nearest == [*range(nearest[0], 24)] and 3 < nearest[0] <= 12


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_damage_in_a_file_without_time_stamps_stops_a_video_there(tmp_path, codec):
    frames = _frames(24, noise=60)
    path = _write_video(tmp_path / "a.avi", frames, codec)
    assert len(list(open_video(path))) == 24
    _blank_packet(path, 12)
    read = []
    with pytest.raises(BrokenVideo, match=r"a.avi: the video breaks off after \d+ of 24 frames"):
        read.extend(open_video(path))
    nearest = [np.abs(frame.astype(int) - frames).mean((1, 2, 3)).argmin() for frame in read]
    assert 8 <= len(read) <= 12 and nearest == list(range(len(read)))


def test_a_video_that_starts_with_damage_is_read_from_its_first_good_frame(tmp_path):
    path = _write_video(tmp_path / "a.mp4", _frames(48, noise=120), gop_size=12)
    _blank_packet(path, 0)
    assert 30 <= len(list(open_video(path))) < 48


def test_pictures_that_change_size_inside_a_video_stop_it(tmp_path):
    video = open_video(_write_video(tmp_path / "a.mp4", _frames(3)))
    video.size = (10, 10)
    with pytest.raises(BrokenVideo, match="change from 10x10 to 64x48"):
        next(iter(video))


def test_a_frame_folder_with_a_broken_picture_stops_there(tmp_path):
    folder = _write_pictures(tmp_path / "clip", _frames(4, noise=100))
    broken = folder / "2.png"
    broken.write_bytes(broken.read_bytes()[:2000])
    with pytest.raises(BrokenVideo, match=r"2\.png: .*; 2 of 4 frames read") as caught:
        list(open_video(folder))
    assert caught.value.frames_read == 2


def test_videos_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(MediaError, match=r"gone\.mp4: no such video file"):
        open_video(tmp_path / "gone.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("this is no video " * 100)
    with pytest.raises(MediaError, match=r"text\.mp4: does not open as a video"):
        open_video(text)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaError, match="empty: no frames"):
        open_video(tmp_path / "empty")
    folder = _write_pictures(tmp_path / "mixed", _frames(3))
    Image.fromarray(_frames(1, (48, 66))[0]).save(folder / "1.png")
    with pytest.raises(MediaError, match=r"1\.png: 66x48 pixels, but the frames before it are 64x48"):
        open_video(folder)


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        container.mux(stream.encode(samples))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match=r"sound\.mp4: holds no video stream"):
        open_video(path)


def test_an_image_of_16_bits_is_refused(tmp_path):
    Image.fromarray(np.full(SIZE, 1000, dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match="more than 8 bits a channel"):
        images.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("codec", [None, "mpeg4"])
@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
def test_a_written_video_reads_back(tmp_path, codec, size):
    frames = _frames(10, size)
    with VideoWriter(tmp_path / "a.mp4", Fraction(30000, 1001), codec) as writer:
        for frame in frames:
            writer.write(frame)
        assert not (tmp_path / "a.mp4").exists()
    video = open_video(tmp_path / "a.mp4")
    assert (video.size, video.frame_count, video.fps) == ((48, 64), 10, Fraction(30000, 1001))
    for frame, expected in zip(video, frames):
        assert np.abs(frame[: size[0], : size[1]].astype(int) - expected).mean() < 6
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_a_video_is_kept_when_the_block_fails_and_absent_without_a_frame(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4") as writer:
        for frame in _frames(5):
            writer.write(frame)
        raise KeyboardInterrupt
    assert len(list(open_video(tmp_path / "a.mp4"))) == 5
    with VideoWriter(tmp_path / "b.mp4"):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_an_overlay_colours_objects_only(tmp_path):
    frame = _frames(1)[0]
    labels = _mask(1, 8, 255)  # 8 takes the first colour again
    painted = images.overlay(frame, labels, alpha=0.5)
    outside = (labels == 0) | (labels == 255)
    np.testing.assert_array_equal(painted[outside], frame[outside])
    colour = images.OVERLAY_COLORS[0]
    np.testing.assert_array_equal(painted[2, 10], colour)  # the line around it
    np.testing.assert_allclose(painted[5, 10], (frame[5, 10] + colour.astype(int)) / 2, atol=1)
    np.testing.assert_allclose(painted[15, 20], (frame[15, 20] + colour.astype(int)) / 2, atol=1)
    np.testing.assert_array_equal(frame, _frames(1)[0])


def test_a_contact_sheet_lays_pictures_out_in_rows(tmp_path):
    tiles = [np.full((4, 6, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    sheet = images.contact_sheet(tiles, columns=2, gap=2)
    assert sheet.shape == (10, 14, 3)
    assert (sheet[:4, :6] == 10).all() and (sheet[:4, 8:] == 20).all() and (sheet[6:, :6] == 30).all()
    assert (sheet[6:, 8:] == 255).all() and (sheet[4:6] == 255).all()
    images.write_image(tmp_path / "sheet.png", sheet)
    np.testing.assert_array_equal(images.read_image(tmp_path / "sheet.png"), sheet)


def test_resizing_keeps_labels_and_changes_size():
    labels = resize_mask(_mask(3, 200), (96, 128))
    assert labels.shape == (96, 128) and set(np.unique(labels)) == {0, 3, 200}
    assert images.resize_frame(_frames(1)[0], (24, 30)).shape == (24, 30, 3)
