"""The overlay: colors that stand out, outlines that are seen on any ground, numbers, sound."""

import av
import numpy as np
import pytest

from stm_model.io.images import OVERLAY_COLORS, label_colors
from stm_model.io.overlay import VANISHES, Overlay, color_distance
from stm_model.io.video import VideoWriter, open_video

ORANGE = tuple(OVERLAY_COLORS[0])


def picture(ground=(90, 120, 90), **objects):
    """A frame and labels with squares: label → color."""
    frame = np.full((80, 160, 3), ground, np.uint8)
    labels = np.zeros((80, 160), np.uint8)
    for place, (label, color) in enumerate(objects.items()):
        box = np.s_[20:60, 10 + 50 * place : 45 + 50 * place]
        frame[box], labels[box] = color, int(label[1:])
    return frame, labels


def test_a_color_that_would_vanish_is_another_one_and_stays_it():
    drawing = Overlay()
    drawing.draw(*picture(o1=ORANGE))
    chosen = drawing.colors[1].copy()
    assert color_distance(chosen, ORANGE) >= VANISHES
    drawing.draw(*picture(o1=chosen))
    assert np.array_equal(drawing.colors[1], chosen)
    other = Overlay()
    other.draw(*picture(o1=(20, 60, 160)))
    assert np.array_equal(other.colors[1], ORANGE)


def test_no_two_objects_have_one_color_while_there_are_enough():
    drawing = Overlay()
    drawing.draw(*picture(o1=ORANGE, o2=tuple(label_colors()[2]), o8=(30, 30, 30)))
    assert len({tuple(drawing.colors[label]) for label in (1, 2, 8)}) == 3


@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), ORANGE, (240, 228, 66)])
def test_an_outline_is_seen_on_any_ground(ground):
    drawing = Overlay("outline")
    frame, labels = picture(ground, o1=ground)
    drawn = drawing.draw(frame, labels)
    outside, inside, beneath = drawn[30, 9], drawn[30, 10], drawn[40, 27]
    assert set(outside) <= {0, 255} and np.array_equal(inside, drawing.colors[1]) and np.array_equal(beneath, ground)
    assert max(color_distance(outside, ground), color_distance(inside, ground)) >= VANISHES
    assert color_distance(outside, inside) >= VANISHES
    assert color_distance(outside, inside) > color_distance(255 - outside.astype(int), inside)
    # no further than the line
    changed = (drawn != frame).any(2)
    assert not changed[:19].any() and not changed[61:].any() and not changed[:, :9].any() and not changed[:, 46:].any()


def test_side_by_side_has_the_frame_as_it_is_on_the_left():
    frame, labels = picture(o1=(20, 60, 160))
    drawn = Overlay("side-by-side").draw(frame, labels)
    assert np.array_equal(drawn[:, :160], frame) and np.array_equal(drawn[:, 160:], Overlay().draw(frame, labels))


def test_several_objects_are_numbered_one_is_not():
    frame, labels = picture(o1=(20, 60, 160), o2=(200, 30, 30))
    changed = (Overlay("outline").draw(frame, labels) != frame).any(2)
    assert changed[25:55, 15:40].any() and changed[25:55, 65:90].any()
    alone = np.where(labels == 1, 1, 0).astype(np.uint8)
    assert not (Overlay("outline").draw(frame, alone) != frame).any(2)[25:55, 15:40].any()


def test_void_is_not_drawn():
    frame, labels = picture(o255=(20, 60, 160))
    assert np.array_equal(Overlay().draw(frame, labels), frame)


@pytest.fixture
def with_sound(tmp_path):
    path, rate = tmp_path / "talk.mp4", 48000
    with av.open(str(path), "w") as file:
        video, sound = file.add_stream("mpeg4", rate=25), file.add_stream("aac", rate=rate)
        video.width = video.height = 64
        sound.layout = "mono"
        for index in range(50):
            file.mux(video.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 5 * index, np.uint8), "rgb24")))
        wave = np.sin(np.arange(2 * rate) / 20).astype(np.float32)[None]
        for start in range(0, 2 * rate, 1024):
            heard = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[:, start : start + 1024]), "fltp", "mono")
            heard.sample_rate, heard.pts = rate, start
            file.mux(sound.encode(heard))
        file.mux(video.encode())
        file.mux(sound.encode())
    return path


def sound_of(path):
    with av.open(str(path)) as file:
        return [(float(packet.pts * packet.time_base), bytes(packet)) for packet in file.demux(audio=0) if packet.size]


@pytest.mark.parametrize("frames", [50, 20])
def test_the_sound_is_copied_as_far_as_the_frames_go(with_sound, tmp_path, frames):
    video = open_video(with_sound)
    with VideoWriter(tmp_path / "out.mp4", 25, time_base=video.time_base, sound=with_sound) as writer:
        for index, frame in zip(range(frames), video):
            writer.write(frame, video.times[index])
    given, copied = sound_of(with_sound), sound_of(tmp_path / "out.mp4")
    assert copied == given[: len(copied)] and len(copied) == sum(time < frames / 25 for time, _ in given)


def test_the_sound_begins_where_the_frames_do(with_sound, tmp_path):
    video = open_video(with_sound)
    with VideoWriter(tmp_path / "out.mp4", 25, time_base=video.time_base, sound=with_sound) as writer:
        for index, frame in zip(range(10, 40, 3), video.frames(range(10, 40, 3)), strict=True):
            writer.write(frame, video.times[index])
    given = [(time - 0.4, content) for time, content in sound_of(with_sound) if 0.4 <= time < 0.4 + 28 / 25]
    copied = sound_of(tmp_path / "out.mp4")
    assert [content for _, content in copied] == [content for _, content in given]
    np.testing.assert_allclose([time for time, _ in copied], [time for time, _ in given], atol=1e-3)


def test_a_video_without_sound_stays_without(tmp_path):
    with VideoWriter(tmp_path / "mute.mp4", 25) as writer:
        writer.write(np.zeros((32, 32, 3), np.uint8))
    with VideoWriter(tmp_path / "out.mp4", 25, sound=tmp_path / "mute.mp4") as writer:
        writer.write(np.zeros((32, 32, 3), np.uint8))
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert not file.streams.audio
