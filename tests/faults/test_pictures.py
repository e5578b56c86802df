"""Pictures that say something other than they seem to: soft edges, alpha channels, turned frames and masks."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from table import Fault, each, judge

from stm_model.io.images import read_image
from stm_model.io.masks import read_mask, read_masks, write_mask
from stm_model.io.video import VideoWriter, open_video

SIZE = (48, 80)


def disc(scale: int = 1) -> np.ndarray:
    """Bool, one disc."""
    rows, columns = np.mgrid[: SIZE[0] * scale, : SIZE[1] * scale]
    return (rows - 24 * scale) ** 2 + (columns - 40 * scale) ** 2 < (15 * scale) ** 2


def soft(made: Path, levels: int, most: int = 255) -> Path:
    """A disc whose edge has so many steps, as an editor draws it."""
    share = disc(8).reshape(SIZE[0], 8, SIZE[1], 8).mean((1, 3))
    path = made / "soft.png"
    Image.fromarray((np.round(share * levels) * (most // levels)).astype(np.uint8)).save(path)
    return path


def colored(made: Path) -> Path:
    """Two objects in red and green."""
    pixels = np.zeros((*SIZE, 3), dtype=np.uint8)
    pixels[5:20, 5:30], pixels[25:40, 40:70] = (255, 0, 0), (0, 255, 0)
    Image.fromarray(pixels).save(made / "colored.png")
    return made / "colored.png"


def turned(made: Path, labels: np.ndarray) -> Path:
    write_mask(made / "turned.png", np.rot90(labels))
    return made / "turned.png"


def labels(count: int) -> np.ndarray:
    """So many squares, each with a label of its own."""
    result = np.zeros(SIZE, dtype=np.uint8)
    for index in range(count):
        row, column = divmod(index, 10)
        result[row * 8 + 1 : row * 8 + 6, column * 8 + 1 : column * 8 + 6] = index + 1
    return result


def palette(made: Path, count: int) -> Path:
    write_mask(made / "many.png", labels(count))
    return made / "many.png"


ASKS = "; add --binary if the mask is one object, --colors if each value is one"
DONE = {"line": "", "code": 0, "masks": 10}
FAULTS = [
    Fault("a soft edge", lambda _, made: {"mask": soft(made, 50)}, f" labels (soft edges?){ASKS}"),
    Fault(
        "a soft edge of few steps",
        lambda _, made: {"mask": soft(made, 4)},
        f"soft.png: labels 63, 126, 189 at the rims of others (soft edges?){ASKS}",
    ),
    Fault(
        "a soft edge of one step",
        lambda _, made: {"mask": soft(made, 2, 200)},
        f"soft.png: label 100 at the rims of others (soft edges?){ASKS}",
    ),
    Fault("a soft edge with --binary", lambda _, made: {"mask": soft(made, 50), "extra": ["--binary"]}, **DONE),
    Fault("a soft edge with --colors", lambda _, made: {"mask": soft(made, 2, 200), "extra": ["--colors"]}, **DONE),
    Fault("17 labels", lambda _, made: {"mask": palette(made, 17)}, f"many.png: 17 labels (soft edges?){ASKS}"),
    Fault("16 labels", lambda _, made: {"mask": palette(made, 16)}, **DONE),
    Fault("17 labels with --colors", lambda _, made: {"mask": palette(made, 17), "extra": ["--colors"]}, **DONE),
    Fault("colors", lambda _, made: {"mask": colored(made)}, "a color picture; expected a palette or grey PNG"),
    Fault(
        "colors with --colors",
        lambda _, made: {"mask": colored(made), "extra": ["--colors"]},
        **DONE | {"line": "labels of its colors: 1 is #00ff00, 2 is #ff0000"},
    ),
    Fault(
        "both",
        lambda _, made: {"mask": colored(made), "extra": ["--colors", "--binary"]},
        "--binary takes the mask for one object, --colors for one of each color; choose one of them",
    ),
    Fault(
        "a turned mask with --resize-mask",
        lambda clip, made: {"mask": turned(made, read_mask(clip / "mask.png")), "extra": ["--resize-mask"]},
        "the mask of frame 0 is 48x80 pixels, the video 80x48; expected a mask that is not turned by 90°",
    ),
]


@each(FAULTS)
def test_the_line_and_what_is_kept(fault, track, clip, tmp_path, out):
    judge(fault, track, clip, tmp_path / "made", out)


def test_thin_objects_and_void_are_no_soft_edges(tmp_path):
    thin = np.zeros(SIZE, dtype=np.uint8)
    thin[10:30, 10:30] = 1
    thin[12:14, 30:70] = 2  # one end touches the other object
    thin[20:22, 20:22] = 3  # small, and inside another
    thin[9, 9:31] = 255
    Image.fromarray(thin).save(tmp_path / "thin.png")
    np.testing.assert_array_equal(read_masks(tmp_path / "thin.png")[0], thin)


def test_colors_have_one_label_in_all_masks(tmp_path):
    (tmp_path / "masks").mkdir()
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for index, seen in enumerate([(red,), (blue, green), (green, red)]):
        pixels = np.zeros((*SIZE, 3), dtype=np.uint8)
        for place, color in enumerate(seen):
            pixels[10 * place + 2 : 10 * place + 9, 5:30] = color
        Image.fromarray(pixels).save(tmp_path / "masks" / f"{index}.png")
    with pytest.warns(UserWarning, match="labels of its colors: 1 is #0000ff, 2 is #00ff00, 3 is #ff0000$"):
        found = read_masks(tmp_path / "masks", colors=True)
    assert [[int(mask[5, 10]), int(mask[15, 10])] for mask in found.values()] == [[3, 0], [1, 2], [2, 3]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("color", [0, 255])
def test_an_object_in_the_alpha_channel(tmp_path, mode, color):
    pixels = np.full((*SIZE, 4), color, dtype=np.uint8)
    pixels[..., 3] = disc() * 255
    Image.fromarray(pixels).convert(mode).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", binary=True), disc())


def test_what_is_transparent_is_no_object(tmp_path):
    pixels = np.full((*SIZE, 4), 255, dtype=np.uint8)
    pixels[:24, :, :3] = 0
    pixels[..., 3] = disc() * 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = disc()
    expected[:24] = False
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", binary=True), expected)
    # an alpha channel that hides all says nothing
    pixels[..., 3] = 0
    Image.fromarray(pixels).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "b.png", binary=True), pixels[..., 0] > 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_pictures_are_turned_as_they_say(tmp_path, orientation, suffix):
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:8, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    folder = tmp_path / "frames"
    folder.mkdir()
    Image.fromarray(pixels).save(folder / f"0.{suffix}", exif=exif)
    shown = read_image(folder / f"0.{suffix}")
    # where EXIF says that the picture's first corner is
    corner = [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0), (0, 1), (1, 1), (1, 0)][orientation - 1]
    quarters = shown.reshape(2, shown.shape[0] // 2, 2, shown.shape[1] // 2, 3).mean((1, 3, 4))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == corner
    assert shown.shape[:2] == open_video(folder).size == ((16, 32) if orientation < 5 else (32, 16))


@pytest.mark.parametrize(
    ("labels", "name", "message"),
    [
        (np.full(SIZE, np.nan), "a.png", "got float64"),
        (np.full(SIZE, 0.5), "a.png", r"labels: expected whole numbers \[H, W\], got float64 \[48, 80\]"),
        (np.zeros((*SIZE, 1), dtype=np.uint8), "a.png", r"got uint8 \[48, 80, 1\]"),
        (np.full(SIZE, 256), "a.png", "labels: expected 0 to 255, got 256 to 256"),
        (np.full(SIZE, -1), "a.png", "labels: expected 0 to 255, got -1 to -1"),
        (np.zeros(SIZE, dtype=np.uint8), "x.jpg", r"x\.jpg: expected a name that ends in \.png"),
    ],
)
def test_what_is_no_mask_is_not_written(tmp_path, labels, name, message):
    with pytest.raises(ValueError, match=message):
        write_mask(tmp_path / name, labels)
    assert not list(tmp_path.iterdir())


def times_of(path: Path) -> list[Fraction]:
    """When each frame is shown, in seconds after the first."""
    with av.open(str(path)) as container:
        times = sorted(packet.pts * packet.time_base for packet in container.demux(video=0) if packet.size)
    return [time - times[0] for time in times]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_the_overlay_keeps_the_times_of_the_frames(track, clip, tmp_path, out, name):
    shown = [0, 1, 2, 7, 8, 30, 31, 32, 50, 51]
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width = SIZE
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 24)
        for time, frame in zip(shown, open_video(clip / "clip.mp4")):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 24)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    expected = times_of(tmp_path / name)
    assert len(expected) == 10 and expected[-1] > 2
    assert track(video=tmp_path / name, overlay=True)[0] == 0
    assert times_of(out / "overlay.mp4") == expected


def test_the_overlay_of_a_folder_and_of_a_file_without_times_is_even(track, clip, tmp_path, out):
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.height, stream.width = SIZE
        stream.pix_fmt = "yuv420p"
        for frame in open_video(clip / "clip.mp4"):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    for video, rate in ((clip / "frames", 24), (tmp_path / "a.avi", 12)):
        assert track("--overwrite", video=video, overlay=True)[0] == 0
        assert times_of(out / "overlay.mp4") == [Fraction(index, rate) for index in range(10)]


def test_frames_of_one_time_are_all_written(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 24, time_base=Fraction(1, 1000)) as writer:
        for time in (0, 0, 40, 40, 30, None):
            writer.write(np.zeros((16, 16, 3), dtype=np.uint8), time)
    assert [time * 1000 for time in times_of(tmp_path / "a.mp4")] == pytest.approx([0, 1, 40, 41, 42, 84], abs=0.5)
