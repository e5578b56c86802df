"""Videos with damage: what is missing is counted, and masks stay with their frames."""

from pathlib import Path

import av
import numpy as np
import pytest
from table import Fault, each, judge

from stm_model.commands.main import main
from stm_model.io.masks import read_mask
from stm_model.io.video import BrokenVideo, open_video


def packets(path: Path) -> list[tuple[int, bytes]]:
    """Time stamp and data of each packet, in the order in which they are stored."""
    with av.open(str(path)) as container:
        return [(packet.pts, bytes(packet)) for packet in container.demux(video=0) if packet.size]


def damaged(clip: Path, made: Path, shown: list[int], keep: int = 0) -> Path:
    """The clip with frames, by their place in the video, whose data is zeros but for the first bytes."""
    path = made / "clip.mp4"
    stored = packets(clip / "clip.mp4")
    times = sorted(time for time, _ in stored)
    whole = (clip / "clip.mp4").read_bytes()
    for time, data in stored:
        if times.index(time) in shown:
            assert whole.count(data) == 1
            whole = whole.replace(data, data[:keep] + bytes(len(data) - keep))
    path.write_bytes(whole)
    return path


def copied(source: Path, target: Path, kind: str, drop: int | None = None, **options: str) -> Path:
    """The clip in another container, without the frame at place `drop`."""
    times = sorted(time for time, _ in packets(source))
    with av.open(str(source)) as old, av.open(str(target), "w", format=kind, container_options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None and (drop is None or packet.pts != times[drop]):
                packet.stream = stream
                new.mux(packet)
    return target


def cut(path: Path, count: int) -> Path:
    """The file without its last bytes."""
    path.write_bytes(path.read_bytes()[:-count])
    return path


FAULTS = [
    Fault(
        "a frame whose data is gone",
        lambda clip, made: {"video": damaged(clip, made, [3])},
        "clip.mp4: 1 of 10 frames are damaged (3); the one before a missing one stands in for it, and those after it "
        "may be wrong; the masks of 10 frames are kept in",
        masks=10,
    ),
    Fault(
        "frames half of whose data is gone",
        lambda clip, made: {"video": damaged(clip, made, [1, 3], keep=20)},
        "clip.mp4: 2 of 10 frames are damaged (1, 3);",
        masks=10,
    ),
    Fault(
        "an mp4 without its last frame's data",
        lambda clip, made: {"video": damaged(clip, made, [9])},
        "clip.mp4: the video breaks off after 9 of 10 frames (Invalid data found",
        masks=9,
    ),
    Fault(
        "an mp4 that is cut off between two frames",
        lambda clip, made: {
            "video": cut(
                copied(clip / "clip.mp4", made / "a.mp4", "mp4", movflags="faststart"),
                len(packets(clip / "clip.mp4")[-1][1]),
            )
        },
        "a.mp4: the video breaks off after 9 of 10 frames (it holds 9 of 10 packets)",
        masks=9,
    ),
    Fault(
        "a transport stream that breaks off",
        lambda clip, made: {"video": cut(copied(clip / "clip.mp4", made / "a.ts", "mpegts"), 188 * 3 + 60)},
        "a.ts: the video breaks off after 9 frames (the file ends within a packet); 1 of 9 frames are damaged (7);",
        masks=9,
    ),
    Fault(
        "a transport stream that lost a frame",
        lambda clip, made: {"video": copied(clip / "clip.mp4", made / "a.ts", "mpegts", drop=3)},
        "a.ts: 1 of 10 frames are damaged (3);",
        masks=10,
    ),
]


@each(FAULTS)
def test_the_line_and_what_is_kept(fault, track, clip, tmp_path, out):
    judge(fault, track, clip, tmp_path / "made", out)


def test_a_list_goes_on_after_a_broken_video(clip, tmp_path, out, weights, capsys):
    path = damaged(clip, tmp_path, [3])
    (tmp_path / "list.txt").write_text(f"{path} {clip}/mask.png ant\n{clip}/frames {clip}/mask.png bee\n")
    arguments = [tmp_path / "list.txt", "--out", out, "--checkpoint", weights, "--device", "cpu", "--no-overlay"]
    assert main(["track", *map(str, arguments)]) == 2
    assert "ant: " in (err := capsys.readouterr().err) and "1 of 10 frames are damaged (3)" in err
    assert len(list((out / "ant" / "masks").iterdir())) == len(list((out / "bee" / "masks").iterdir())) == 10


def test_masks_stay_with_their_frames(track, clip, tmp_path, out):
    """A mask given for a frame after a missing one is that frame's."""
    given = tmp_path / "given"
    given.mkdir()
    for index in (0, 6):
        (given / f"{index:05d}.png").write_bytes((clip / "true" / f"{index:05d}.png").read_bytes())
    code, _, err = track(video=damaged(clip, tmp_path, [3]), mask=given)
    assert code == 2 and "damaged (3)" in err
    np.testing.assert_array_equal(read_mask(out / "masks" / "00006.png"), read_mask(given / "00006.png"))


@pytest.mark.parametrize("kind", ["mp4", "matroska", "mpegts"])
def test_what_is_whole_is_not_called_damaged(clip, tmp_path, kind):
    video = open_video(copied(clip / "clip.mp4", tmp_path / "a", kind))
    assert len(list(video)) == video.frame_count == 10


def test_a_video_of_changing_rate_is_not_called_damaged(clip, tmp_path):
    video = open_video(copied(clip / "clip.mp4", tmp_path / "a.mkv", "matroska", drop=3))
    assert len(list(video)) == video.frame_count == 9


def test_the_frames_of_a_broken_video_come_before_its_error(clip, tmp_path):
    frames, whole = [], list(open_video(clip / "clip.mp4"))
    with pytest.raises(BrokenVideo, match="damaged") as caught:
        for frame in open_video(damaged(clip, tmp_path, [3])):
            frames.append(frame)
    assert len(frames) == caught.value.frames_read == 10
    np.testing.assert_array_equal(frames[3], frames[2])
    for index in (0, 1, 2):
        np.testing.assert_array_equal(frames[index], whole[index])
