"""Label maps in and out: uint8 `[H, W]`, 0 is background, 255 void (unknown), every other value an object's label."""

from __future__ import annotations

import os
import warnings
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image

from stm_model.io.files import whole
from stm_model.io.images import MediaError, file_number, open_picture, picture_files, read_image, upright
from stm_model.labels import VOID, objects_in

if TYPE_CHECKING:
    from stm_model.io.video import Video

MAX_GREY_LABELS = 64
"""A grey picture with more values than this is a photograph or has soft edges: it holds no labels."""
MAX_LABELS = 16
"""More labels than this in a mask given for a video are soft edges, unless the user says otherwise."""
OPAQUE = 127
"""An alpha above which a pixel shows."""


def read_mask(path: str | os.PathLike, *, binary: bool = False) -> np.ndarray:
    """Read the labels of a mask picture.

    Args:
        path: a palette picture (the palette's indices are the labels) or a grey one (the grey values are), usually PNG.
        binary: take the picture for one object, label 1: every pixel brighter than half of the brightest, or with a
            palette every index but 0. For black-and-white masks (0 and 255), soft edges and JPEG. What is transparent
            is no object; where all that is not has one color, all of it is the object.

    Returns:
        uint8 labels `[H, W]`; 255 is void. A 1-bit picture has labels 0 and 1.

    Raises:
        MediaError: unreadable, in color, labels above 255, JPEG, or a grey picture of more than 64 values.
    """
    with open_picture(path) as image:
        mode, lossy = image.mode, image.format in ("JPEG", "MPO")
        image = upright(image)
        opaque = np.array(image.convert("RGBA"))[..., 3] > OPAQUE if image.has_transparency_data else None
        pixels = np.array(image.convert("L") if binary and mode.startswith(("RGB", "CMYK", "YCbCr")) else image)
    if mode in ("LA", "PA"):
        pixels = pixels[..., 0]
    if binary:
        shown = np.ones(pixels.shape, dtype=bool) if opaque is None or not opaque.any() else opaque
        if not shown.all() and np.ptp(pixels[shown]) == 0:
            return shown.astype(np.uint8)
        return ((pixels > (0 if mode in ("P", "PA") else pixels[shown].max() / 2)) & shown).astype(np.uint8)
    if lossy:
        raise MediaError(f"{path}: JPEG changes labels; expected a palette or grey PNG (or --binary for one object)")
    if pixels.ndim == 3:
        if (pixels[..., :3] != pixels[..., :1]).any():
            raise MediaError(
                f"{path}: a color picture; expected a palette or grey PNG whose values are labels, or --colors"
            )
        pixels = pixels[..., 0]
    if pixels.min() < 0 or pixels.max() > 255:
        raise MediaError(f"{path}: label {int(pixels.max())} found; expected labels from 0 to 255")
    if mode != "P" and (count := len(np.unique(pixels))) > MAX_GREY_LABELS:
        raise MediaError(
            f"{path}: {count} grey values are too many for labels (soft edges?); expected a palette PNG, at most "
            f"{MAX_GREY_LABELS} grey values, or --binary for one object"
        )
    return pixels.astype(np.uint8)


def has_palette(path: str | os.PathLike) -> bool:
    """Whether a picture stores indices of a palette, as label maps do. Raises MediaError if it cannot be read."""
    with open_picture(path) as image:
        return image.mode in ("P", "PA")


def read_masks(
    path: str | os.PathLike,
    video: Video | None = None,
    *,
    first: int = 0,
    binary: bool = False,
    colors: bool = False,
) -> dict[int, np.ndarray]:
    """Read the given masks of a video: frame → uint8 labels `[H, W]`.

    Args:
        path: one mask, or a folder of masks, named by frame number (`00005.png`, `mask_5.png`) or, if
            `video` is a folder, as its frames, or by the numbers in their names.
        video: checks that the frames exist.
        first: the frame of one mask; where it is not 0, one whose name is a number must be of that frame.
        binary: see `read_mask`.
        colors: take every color of all masks for an object, 1, 2, … in their order as `(R, G, B)`, black for the
            background; a palette's indices and grey values stay as they are, however many.

    Raises:
        MediaError: as `read_mask`, soft edges that look like labels, no masks, two for one frame, one of no frame, or
            no object in any of them.
    """
    path = Path(path)
    by_index = mask_files(path, video, first)
    if colors and any(map(_is_colored, by_index.values())):
        masks = dict(zip(by_index, _color_labels([read_image(file) for file in by_index.values()], path)))
    else:
        masks = {index: read_mask(file, binary=binary) for index, file in by_index.items()}
        if not colors:
            for index, file in by_index.items():
                _refuse_soft_edges(masks[index], file)
    if not any(map(objects_in, masks.values())):
        if any((labels == VOID).any() for labels in masks.values()):
            raise MediaError(f"{path}: its only label is 255, which is void; for a black-and-white mask use --binary")
        raise MediaError(f"{path}: an empty mask, no pixel belongs to an object")
    return masks


def mask_files(path: Path, video: Video | None = None, first: int = 0) -> dict[int, Path]:
    """Frame → its mask, in ascending order; for the arguments see `read_masks`.

    Raises:
        MediaError: no masks, two for one frame, or one of no frame.
    """
    files = picture_files(path) if path.is_dir() else [path]
    if not files:
        raise MediaError(f"{path}: no masks; expected PNG files named by frame number, like 00000.png")
    if not path.is_dir():
        check_first(path, video, first)
    by_index: dict[int, Path] = {}
    for file, index in zip(files, frame_indices(files, video) if path.is_dir() else [first]):
        if index in by_index:
            raise MediaError(f"{file}: frame {index} already has the mask {by_index[index].name}")
        by_index[index] = file
    return dict(sorted(by_index.items()))


def check_first(path: Path, video: Video | None, first: int) -> None:
    """Raise a MediaError if a single mask of the frame `first`, where that is not 0, names another one."""
    if first and path.stem.isdigit() and frame_indices([path], video) != [first]:
        raise MediaError(f"{path}: is the mask of another frame, by its name, than the first that is tracked")


def frame_indices(files: list[Path], video: Video | None) -> list[int]:
    """The frames that masks of these names are of. Raises a MediaError that names one of no frame."""
    frames = video.files if video else ()
    stems = {file.stem: index for index, file in enumerate(frames)}
    numbers = {number: index for index, number in enumerate(video.numbers)} if video else {}
    by_name = any(file.stem in stems for file in files)
    indices = []
    for file in files:
        number = file_number(file)
        index = stems.get(file.stem) if by_name else number if number is None or not numbers else numbers.get(number)
        if index is None:
            expected = "the name of a frame of the video" if by_name else "a name that ends in the frame's number"
            if numbers and number is not None and not by_name and video:
                raise MediaError(
                    f"{file}: a mask for frame {number}, but {video.path} has the frames {min(numbers)} to "
                    f"{max(numbers)}"
                )
            raise MediaError(f"{file}: expected {expected}")
        if video and video.frame_count is not None and index >= video.frame_count:
            last = video.frame_count - 1
            raise MediaError(f"{file}: a mask for frame {index}, but {video.path} has the frames 0 to {last}")
        indices.append(index)
    return indices


def _is_colored(file: Path) -> bool:
    with open_picture(file) as image:
        return image.mode.startswith(("RGB", "CMYK", "YCbCr"))


def _color_labels(pictures: list[np.ndarray], path: Path) -> list[np.ndarray]:
    """The labels `[H, W]` of pictures `[H, W, 3]` with a color for each object."""
    coded = [picture.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32) for picture in pictures]
    known = np.unique(np.concatenate([[0], *map(np.unique, coded)]))
    if len(known) > VOID:
        raise MediaError(
            f"{path}: {len(known) - 1} colors are too many for objects (soft edges?); expected at most 254"
        )
    table = ", ".join(f"{label} is #{color:06x}" for label, color in enumerate(known[:9].tolist()) if label)
    warnings.warn(f"{path}: labels of its colors: {table}{', …' if len(known) > 9 else ''}", stacklevel=3)
    return [np.searchsorted(known, picture).astype(np.uint8) for picture in coded]


def _refuse_soft_edges(labels: np.ndarray, file: Path) -> None:
    """Raise a MediaError for more than `MAX_LABELS` labels, or grey values that are nothing but the rims of others."""
    wrong = ""
    if len(found := objects_in(labels)) > MAX_LABELS:
        wrong = f"{len(found)} labels"
    elif not has_palette(file) and (rims := _rims(labels)):
        wrong = f"{'labels' if len(rims) > 1 else 'label'} {', '.join(map(str, rims))} at the rims of others"
    if wrong:
        raise MediaError(
            f"{file}: {wrong} (soft edges?); add --binary if the mask is one object, --colors if each value is one"
        )


def _rims(labels: np.ndarray) -> list[int]:
    """The labels that are thin and lie beside others, where together they are a quarter of the others' outline: of an
    edge with a single step they are about half.
    """
    from scipy import ndimage

    most, least = ndimage.maximum_filter(labels, 3), ndimage.minimum_filter(labels, 3)
    thick = np.isin(labels, labels[(labels > 0) & (most == least)])
    thin = (labels > 0) & (labels < VOID) & ~thick
    # with a greater label beside it, or a smaller one but 0
    beside = (most != labels) | (ndimage.minimum_filter(np.where(labels, labels, VOID), 3) != labels)
    sizes, touching = (np.bincount(labels[part], minlength=256) for part in (thin, thin & beside))
    rims = np.flatnonzero((sizes > 0) & (4 * touching >= 3 * sizes))
    outline = (thick & (most != least)).sum()
    return rims.tolist() if outline and 4 * sizes[rims].sum() >= outline else []


class MaskStream:
    """Label maps one after the other into a binary file, as stdout is.

    Args:
        file: where they go; flushed after each.
        form: `y4m`, grey values are the labels, or `png`, palette PNGs as `write_mask` makes them.
        fps: frames a second, which y4m says.
    """

    def __init__(self, file: IO[bytes], form: str, fps: Fraction):
        self.file, self.form, self.fps, self._began = file, form, fps, False

    def write(self, labels: np.ndarray) -> None:
        """Append the labels uint8 `[H, W]` of the next frame. Raises an OSError where nobody reads any more."""
        if self.form == "png":
            _palette_picture(labels).save(self.file, format="PNG")
        else:
            if not self._began:
                size = f"W{labels.shape[1]} H{labels.shape[0]}"
                rate = f"F{self.fps.numerator}:{self.fps.denominator}"
                self.file.write(f"YUV4MPEG2 {size} {rate} Ip A1:1 Cmono\n".encode())
            self._began = True
            self.file.write(b"FRAME\n" + labels.tobytes())
        self.file.flush()


def write_mask(path: str | os.PathLike, labels: np.ndarray) -> None:
    """Write labels `[H, W]`, whole numbers 0…255, as a PNG with DAVIS' palette. A file of that name is there whole or
    not at all.

    Raises:
        ValueError: the labels are of another form or the name is not that of a PNG.
        OSError: it cannot be written.
    """
    labels = np.asarray(labels)
    fractions = labels.dtype.kind == "f" and (labels != np.round(labels)).any()
    if labels.ndim != 2 or labels.dtype.kind not in "buif" or fractions:
        raise ValueError(f"labels: expected whole numbers [H, W], got {labels.dtype} {list(labels.shape)}")
    if labels.size and not 0 <= labels.min() <= labels.max() <= 255:
        raise ValueError(f"labels: expected 0 to 255, got {labels.min()} to {labels.max()}")
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path}: expected a name that ends in .png, as masks are PNG files")
    with whole(path) as partial:
        _palette_picture(labels.astype(np.uint8)).save(partial, format="PNG")


def _palette_picture(labels: np.ndarray) -> Image.Image:
    """With DAVIS' 256 colors: bits 0, 3, 6 of a label make red, highest bit first; the next, green, blue."""
    values = np.arange(256)
    channels = [sum(((values >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    image = Image.fromarray(labels, mode="P")
    image.putpalette(np.stack(channels, axis=1).astype(np.uint8).tobytes())
    return image


def resize_mask(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 labels `[H, W]` to `size` (H, W) in pixels: each pixel takes its nearest neighbour's label."""
    return np.array(Image.fromarray(labels).resize((size[1], size[0]), Image.Resampling.NEAREST))
