"""Masks in and out: palette, grey and binary PNGs, folders of them."""

import numpy as np
import pytest
from PIL import Image

from stm_model.io.images import MediaError
from stm_model.io.masks import read_mask, read_masks, write_mask
from stm_model.io.video import open_video

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


def _save_mask(path, mask, mode=None):
    image = Image.fromarray(mask)
    (image.convert(mode) if mode else image).save(path)
    return path


# masks in


def test_palette_and_grey_masks_give_the_labels_as_stored(tmp_path):
    mask = _mask(3, 200, 255)
    write_mask(tmp_path / "palette.png", mask)
    _save_mask(tmp_path / "grey.png", mask)
    _save_mask(tmp_path / "equal.png", mask, "RGB")
    _save_mask(tmp_path / "alpha.png", mask, "LA")
    Image.fromarray(mask.astype(np.uint16)).save(tmp_path / "sixteen.png")
    for name in ("palette", "grey", "equal", "alpha", "sixteen"):
        read = read_mask(tmp_path / f"{name}.png")
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, mask, err_msg=name)
    Image.fromarray(_mask(1) > 0).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "bit.png"), _mask(1))


def test_a_palette_may_have_more_labels_than_grey_values_may(tmp_path):
    many = np.tile(np.arange(SIZE[1], dtype=np.uint8) * 3, (SIZE[0], 1))
    many[0, 0] = 1
    assert len(np.unique(many)) == 65
    write_mask(tmp_path / "palette.png", many)
    np.testing.assert_array_equal(read_mask(tmp_path / "palette.png"), many)


def test_a_binary_mask_is_one_object(tmp_path):
    black_and_white = _mask(255)
    _save_mask(tmp_path / "grey.png", black_and_white)
    _save_mask(tmp_path / "photo.jpg", black_and_white)
    _save_mask(tmp_path / "colour.png", black_and_white, "RGB")
    write_mask(tmp_path / "palette.png", _mask(3))
    soft = black_and_white.astype(np.uint8)
    soft[soft == 0] = np.arange((soft == 0).sum()) % 100
    _save_mask(tmp_path / "soft.png", soft)
    for name in ("grey.png", "photo.jpg", "colour.png", "palette.png", "soft.png"):
        np.testing.assert_array_equal(read_mask(tmp_path / name, binary=True), _mask(1), err_msg=name)


def test_masks_that_cannot_be_used_are_named(tmp_path):
    colour = np.zeros((*SIZE, 3), dtype=np.uint8)
    colour[2:9, 5:30] = (128, 0, 0)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(_mask(1).astype(np.uint16) * 300).save(tmp_path / "big.png")
    _save_mask(tmp_path / "photo.jpg", _mask(1))
    _save_mask(tmp_path / "soft.png", np.tile(np.arange(64, dtype=np.uint8) * 3, (48, 1)) + _mask(1))
    (tmp_path / "text.png").write_text("not a picture")
    for name, message in {
        "colour.png": "a color picture; expected a palette or grey PNG",
        "big.png": "label 300 found; expected labels from 0 to 255",
        "photo.jpg": "JPEG changes labels",
        "soft.png": "grey values are too many for labels",
        "text.png": "cannot be read as a picture",
        "gone.png": "no such file",
    }.items():
        with pytest.raises(MediaError, match=rf"{name}: .*{message}|{name}: {message}"):
            read_mask(tmp_path / name)


def test_one_mask_is_for_the_first_frame(tmp_path):
    write_mask(tmp_path / "00007.png", _mask(4))
    masks = read_masks(tmp_path / "00007.png")
    assert list(masks) == [0]
    np.testing.assert_array_equal(masks[0], _mask(4))


def test_a_folder_of_masks_goes_by_frame_number(tmp_path):
    for name, label in {"mask_10": 2, "mask_9": 1, "mask_011": 3}.items():
        write_mask(tmp_path / f"{name}.png", _mask(label))
    masks = read_masks(tmp_path)
    assert {index: labels.max() for index, labels in masks.items()} == {9: 1, 10: 2, 11: 3}
    assert list(masks) == [9, 10, 11]


def test_masks_named_as_the_frames_go_by_the_name(tmp_path):
    video = open_video(_write_pictures(tmp_path / "clip", _frames(4), "shot_{}0.png"))
    folder = tmp_path / "masks"
    folder.mkdir()
    write_mask(folder / "shot_20.png", _mask(1))
    assert list(read_masks(folder, video)) == [2]
    write_mask(folder / "shot_25.png", _mask(1))
    with pytest.raises(MediaError, match=r"shot_25\.png: expected the name of a frame"):
        read_masks(folder, video)


def test_mask_folders_that_cannot_be_used_are_named(tmp_path):
    video = open_video(_write_pictures(tmp_path / "clip", _frames(4), "f{}.png"))

    def refused(message, masks, **options):
        folder = tmp_path / f"masks{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, mask in masks.items():
            write_mask(folder / name, mask)
        with pytest.raises(MediaError, match=message):
            read_masks(folder, **options)

    refused("no masks; expected PNG files", {})
    refused("first.png: expected a name that ends in the frame's number", {"first.png": _mask(1)})
    refused(r"1\.png: frame 1 already has the mask", {"01.png": _mask(1), "1.png": _mask(1)})
    refused(r"4\.png: a mask for frame 4, but .*clip has the frames 0 to 3", {"4.png": _mask(1)}, video=video)
    refused("an empty mask, no pixel belongs to an object", {"0.png": _mask(), "1.png": _mask()})
    refused("its only label is 255, which is void; .* use --binary", {"0.png": _mask(255)})


def test_an_empty_mask_beside_a_full_one_is_fine(tmp_path):
    write_mask(tmp_path / "0.png", _mask(1))
    write_mask(tmp_path / "3.png", _mask())
    assert list(read_masks(tmp_path)) == [0, 3]


# out


def test_a_written_mask_reads_back_and_has_the_davis_palette(tmp_path):
    write_mask(tmp_path / "a.png", _mask(1, 2, 255))
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), _mask(1, 2, 255))
    palette = np.array(Image.open(tmp_path / "a.png").getpalette()).reshape(-1, 3)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 8: (64, 0, 0), 21: (128, 64, 128), 22: (0, 192, 128)}
    for label, colour in known.items():
        assert tuple(palette[label]) == colour
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_mask_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_mask(tmp_path / "a.png", _mask(1))

    def full_disk(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_mask(tmp_path / "a.png", _mask(2))
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), _mask(1))
