"""Animated pictures as videos, and parts of a video by number and time."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from test_video import _frames, _write_video

from stm_model.io.damage import BrokenVideo
from stm_model.io.images import MediaError
from stm_model.io.video import VideoWriter, open_video

DURATIONS = [100, 50, 200, 100, 50]


def frames():
    """Five frames of one grey each."""
    return [np.full((48, 64, 3), 50 * index, dtype=np.uint8) for index in range(5)]


@pytest.fixture(params=["walk.webp", "walk.gif", "walk"])
def animation(request, tmp_path):
    """Those frames as a file, for so many milliseconds each."""
    first, *others = map(Image.fromarray, frames())
    kind = "GIF" if request.param.endswith("gif") else "WEBP"
    path = tmp_path / request.param
    first.save(path, kind, save_all=True, append_images=others, duration=DURATIONS, lossless=True)
    return path


def test_an_animated_picture_is_a_video_with_its_times(animation):
    video = open_video(animation)
    assert (video.name, video.size, video.frame_count, video.fps) == ("walk", (48, 64), 5, 10)
    assert (video.times, video.time_base) == ([0, 100, 150, 350, 450], Fraction(1, 1000))
    for _ in range(2):
        np.testing.assert_array_equal(np.stack(list(video)), np.stack(frames()))
    np.testing.assert_array_equal(np.stack(list(video.frames(range(1, 5, 2)))), np.stack(frames())[1:5:2])
    assert [video.place(Fraction(text)) for text in ("0", "0.1", "0.11", "0.5")] == [0, 1, 2, 5]


def test_a_frame_without_a_duration_is_shown_as_browsers_do(tmp_path):
    first, *others = map(Image.fromarray, frames())
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=0)
    assert open_video(tmp_path / "a.gif").times == [0, 100, 200, 300, 400]


def test_a_cut_animation_gives_its_whole_frames_first(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (5, 48, 64, 3), dtype=np.uint8)
    first, *others = map(Image.fromarray, noise)
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=50)
    whole = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(whole[: len(whole) * 7 // 10])
    read = []
    with pytest.raises(BrokenVideo, match=r"a.gif: the video breaks off after 3 of 4 frames"):
        read.extend(open_video(tmp_path / "a.gif"))
    assert len(read) == 3
    (tmp_path / "a.gif").write_bytes(whole[:200])
    with pytest.raises(MediaError, match="a.gif: "):
        open_video(tmp_path / "a.gif")


def test_a_still_webp_is_a_video_of_one_frame(tmp_path):
    Image.fromarray(frames()[3]).save(tmp_path / "a.webp", lossless=True)
    (frame,) = open_video(tmp_path / "a.webp")
    np.testing.assert_array_equal(frame, frames()[3])


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4")])
def test_some_frames_of_a_file(tmp_path, name, codec):
    video = open_video(_write_video(tmp_path / name, _frames(24, noise=60), codec, gop_size=6))
    every, times = list(video), video.times
    np.testing.assert_array_equal(list(video.frames(range(15, 22, 3))), every[15:22:3])
    assert video.times == times[:22]
    np.testing.assert_array_equal(list(video.frames(range(15, 99))), every[15:])
    assert [video.place(at) for at in (7, Fraction(0), Fraction(7, 24), Fraction(3, 10))] == [7, 0, 7, 8]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_cut_is_told_to_who_reads_from_the_middle(tmp_path, name):
    options = {"movflags": "faststart"} if name == "a.mp4" else {}
    path = _write_video(tmp_path / name, _frames(48, noise=120), gop_size=6, container_options=options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    video = open_video(path)
    with pytest.raises(BrokenVideo) as whole:
        list(video)
    with pytest.raises(BrokenVideo) as part:
        list(video.frames(range(12, 100)))
    assert str(part.value).split("(")[0] == str(whole.value).split("(")[0]
    assert len(list(video.frames(range(2, 12, 3)))) == 4


def test_a_time_is_found_where_frames_are_shown_for_different_times(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 25, time_base=Fraction(1, 1000)) as writer:
        for frame, time in zip(frames(), [0, 100, 150, 350, 450]):
            writer.write(frame, time)
    video = open_video(tmp_path / "a.mp4")
    assert [video.place(Fraction(text)) for text in ("0", "0.1", "0.11", "0.3", "0.45", "3")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("pattern, numbers", [("f{:05d}.png", [1, 3, 5]), ("{}x.png", ())])
def test_frames_of_a_folder_are_found_by_their_numbers(tmp_path, pattern, numbers):
    for index, frame in zip([1, 3, 5], frames()):
        Image.fromarray(frame).save(tmp_path / pattern.format(index))
    video = open_video(tmp_path)
    assert list(video.numbers) == list(numbers)
    assert [video.place(at) for at in (0, 1, 2, 3, 6)] == ([0, 0, 1, 1, 3] if numbers else [0, 1, 2, 3, 3])
    assert video.place(Fraction(1, 24)) == 1
    np.testing.assert_array_equal(list(video.frames(range(1, 3))), frames()[1:3])
